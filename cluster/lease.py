"""One writer a run: a lease in the run's folder that runs out unless its owner renews it.

    lease/00000003.json   {"generation": 3, "owner": ..., "token": ..., "expires": ...}

A writer takes a run over by creating the next generation's object, which a store grants to one
writer only. From then on every earlier writer is fenced: before it commits a checkpoint it renews
its lease, finds the later generation, and stops. This needs nothing but create-if-absent, so
folders and object stores behave alike.
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
from dataclasses import asdict, dataclass

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
    token: str

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.generation:08d}.json"

    def renew(self, run: Storage) -> None:
        """Hold the run for another LIFETIME_S. Raises LeaseError if another writer took it."""
        newest = _newest(run)
        if newest is None or newest.lease != self:
            taken = "by another writer" if newest is None else f"by {newest.lease.owner}"
            raise LeaseError(f"{run.url} was taken over {taken}: this writer stops")
        run.put(self.key, self.document(time.time() + LIFETIME_S))

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

    An expired lease is taken over. One that could still be of a dead writer is watched until it
    expires or is renewed. Raises LeaseError where another writer lives.
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
            lease.renew(run)
            run.put(lease.key, lease.document(0))


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
            for key in run.list(FOLDER):
                if key < lease.key:
                    run.delete(key)
            return lease
        if created:
            run.delete(lease.key)


def _await_expiry(run: Storage, held: _Held) -> None:
    """Return once the lease expired or was released; raise LeaseError once it is renewed."""
    left = held.expires - time.time()
    if left > 2 * LIFETIME_S:  # beyond what differing clocks explain
        raise LeaseError(_refusal(run, held))
    if left > 0:
        print(f"{held.describe(run)}: watching whether it lives", file=sys.stderr, flush=True)
    while time.time() < held.expires:
        time.sleep(min(1, max(0, held.expires - time.time())))
        now = _newest(run)
        if now is None or (now.lease == held.lease and not now.expires):
            return
        if now != held:
            raise LeaseError(_refusal(run, now))


def _refusal(run: Storage, held: _Held) -> str:
    return f"{held.describe(run)}: wait until that ends, or write to another place"


def _newest(run: Storage) -> _Held | None:
    keys = run.list(FOLDER)
    while keys:
        # A key can vanish after the listing: its successor deletes it.
        with suppress(MissingObjectError):
            fields = json.loads(run.get(keys[-1]))
            expires = fields.pop("expires")
            return _Held(Lease(**fields), expires)
        keys = run.list(FOLDER)
    return None


def _beat(run: Storage, lease: Lease, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        try:
            lease.renew(run)
        except LeaseError:
            return  # the worker's next commit says so
        except StorageError:
            continue  # the store may be back before the lease runs out
