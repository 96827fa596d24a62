"""One writer a run: a lease in the run's folder that runs out unless its owner renews it.

    lease/00000003.json   {"generation": 3, "owner": ..., "token": ..., "expires": ...}

A writer takes a run over by creating the next generation's object, which a store grants to one
writer only. From then on every earlier writer is fenced: before it commits a checkpoint it renews
its lease, finds the later generation, and stops. A group of workers that is started again advances
its own writer's lease by a generation, and so fences the group before it, whose processes may
still live. This needs nothing but create-if-absent, so folders and object stores behave alike.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from cluster.storage import MissingObjectError, Storage, StorageError

FOLDER = "lease"
# A writer that dies holds its run for LIFETIME_S; a heartbeat may fail twice before it is lost.
LIFETIME_S = 20
HEARTBEAT_S = 5


class LeaseError(StorageError):
    """Another writer holds the run: one line with its owner and expiry."""


@dataclass(frozen=True)
class Lease:
    """The right to write a run. Plain data: workers get a copy and check it against the store."""

    generation: int
    owner: str
    token: str  # the same in all generations of one writer

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.generation:08d}.json"

    def newest(self, run: Storage) -> "Lease":
        """This writer's newest generation. Raises LeaseError if another writer took the run."""
        held = _newest(run)
        if held is None or held.lease.token != self.token:
            taken = held and f"was taken over by {held.lease.owner}"
            gone = "has lost its lease, or the folder is gone"
            raise LeaseError(f"{run.url} {taken or gone}: this writer stops")
        return held.lease

    def check(self, run: Storage) -> None:
        """Raise LeaseError if there is a later generation, of whichever writer."""
        if self.newest(run) != self:
            raise LeaseError(f"{run.url} has a later start of its workers: this one stops")

    def renew(self, run: Storage) -> None:
        """Hold the run for another LIFETIME_S. Raises what `check` does."""
        self.check(run)
        self.extend(run)

    def extend(self, run: Storage) -> None:
        """Hold the run for LIFETIME_S from now on, unchecked."""
        run.put(self.key, self.document(time.time() + LIFETIME_S))

    def advance(self, run: Storage) -> "Lease":
        """Take this writer's next generation, which fences those who have an earlier one."""
        while True:
            newest = self.newest(run)
            lease = replace(newest, generation=newest.generation + 1)
            # Refused too where only the reply to a create was lost: then the one after that.
            if run.create(lease.key, lease.document(time.time() + LIFETIME_S)):
                _delete_before(run, lease)
                return lease

    def document(self, expires: float) -> bytes:
        return json.dumps({**asdict(self), "expires": expires}).encode()


@dataclass(frozen=True)
class _Held:
    lease: Lease
    expires: float  # seconds since the epoch, 0 once released

    def describe(self, run: Storage) -> str:
        until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.expires))
        return f"{run.url} is being written by {self.lease.owner}, whose lease lasts to {until}"


@contextmanager
def hold_lease(run: Storage) -> Iterator[Lease]:
    """Own the run inside the block, with a heartbeat from a thread.

    A released lease is taken over at once; any other is watched until it is renewed, or has expired
    without that. Raises LeaseError where another writer lives.
    """
    lease = _acquire(run)
    stopped = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(run, lease, stopped), daemon=True)
    heartbeat.start()
    try:
        yield lease
    finally:
        stopped.set()
        heartbeat.join()
        with suppress(StorageError):  # a lease that cannot be released expires by itself
            last = lease.newest(run)
            run.put(last.key, last.document(0))


def _acquire(run: Storage) -> Lease:
    owner = f"{socket.gethostname()} process {os.getpid()}"
    while True:
        held = _newest(run)
        if held is not None:
            _await_expiry(run, held)
        lease = Lease(held.lease.generation + 1 if held else 1, owner, uuid.uuid4().hex)
        created = run.create(lease.key, lease.document(time.time() + LIFETIME_S))
        newest = _newest(run)
        # The reply to a create can be lost and its repetition refused: the token tells.
        if newest is not None and newest.lease == lease:
            _delete_before(run, lease)
            return lease
        if created:
            run.delete(lease.key)


def _delete_before(run: Storage, lease: Lease) -> None:
    for key in run.list(FOLDER):
        if key < lease.key:
            run.delete(key)


def _await_expiry(run: Storage, held: _Held) -> None:
    """Return once the lease expired or was released; raise LeaseError once it is renewed."""
    if not held.expires:
        return
    # By a clock that is ahead of the writer's a lease has expired while the writer lives.
    left = max(held.expires - time.time(), 2 * HEARTBEAT_S)
    if left > 2 * LIFETIME_S:  # beyond what differing clocks explain
        raise LeaseError(_refusal(run, held))
    print(f"{held.describe(run)}: watching whether it lives", file=sys.stderr, flush=True)
    deadline = time.monotonic() + left
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(1, left))
        now = _newest(run)
        if now is None or not now.expires:
            return
        if now != held:
            raise LeaseError(_refusal(run, now))


def _refusal(run: Storage, held: _Held) -> str:
    return f"{held.describe(run)}: wait until that ends, or write to another place"


def _newest(run: Storage) -> _Held | None:
    while keys := run.list(FOLDER):
        # A key can vanish after the listing: its successor deletes it.
        with suppress(MissingObjectError):
            content = run.get(keys[-1])
            try:
                fields = json.loads(content)
                return _Held(expires=fields.pop("expires"), lease=Lease(**fields))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StorageError(
                    f"{run.url}/{keys[-1]} is damaged: delete it once nobody writes there"
                ) from None
    return None


def _beat(run: Storage, lease: Lease, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        try:
            lease.newest(run).extend(run)
        except LeaseError:
            return  # the workers look for themselves, see `RunLog`
        except StorageError:
            continue  # the store may be back before the lease runs out
