"""Reads that are repeated when the network or the store fails for a moment; ranges of objects.

Each failure of a range is counted, so that a run shows what its store is like. What cannot get
better is an error at once: an object that is not there, a denied access.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from cluster.storage import (
    AccessDeniedError,
    MissingObjectError,
    Patience,
    Storage,
    StorageError,
)

# The client itself repeats nothing: repeats are bounded, spread and counted here.
PATIENCE = Patience(stall_s=10, request_s=30, retries=0)
ATTEMPTS = 10
# The pause doubles with each failure: 45 s in all, in which a store recovers from an overload.
# Damaged bytes are no sign of one: they lengthen no pause.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 20.0
# Bytes that arrive damaged this often are damaged where they lie.
DAMAGED_ATTEMPTS = 8

T = TypeVar("T")


class DamagedObjectError(StorageError):
    """The one line of bytes that are not what was written, however often they are read."""


def read_again(read: Callable[[], T], wait: Callable[[float], bool | None]) -> T:
    """What `read` returns, called again while the store fails or what it sent is damaged.

    `wait` spends the pause before another attempt, seconds; it returns True to give up.

    Raises StorageError with the reason of the last attempt; what was damaged too often, is not
    there or is denied keeps its kind.
    """
    damaged = 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read()
        except (MissingObjectError, AccessDeniedError):
            raise
        except StorageError as error:
            reason = f"{error} ({attempt} attempts)"
            damaged += isinstance(error, DamagedObjectError)
            if damaged == DAMAGED_ATTEMPTS:
                raise type(error)(reason) from None
        pause = min(FIRST_PAUSE_S * 2 ** (attempt - damaged - 1), LONGEST_PAUSE_S)
        # Workers that failed together must not come back together.
        if attempt == ATTEMPTS or wait(pause * random.uniform(0.5, 1.5)):
            break
    raise StorageError(reason)


class ReadCounters:
    """Requests, retries, bytes, samples and cache_hits, counted by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, **amounts: int) -> None:
        with self._lock:
            self._values.update(amounts)

    def take(self) -> Counter[str]:
        """The counts since the previous call."""
        with self._lock:
            taken, self._values = self._values, Counter()
            return taken


class RangeReader:
    """Reads byte ranges of the objects below one URL; usable from many threads."""

    def __init__(self, storage: Storage, counters: ReadCounters | None = None) -> None:
        self.url = storage.url
        self.counters = counters or ReadCounters()
        self._storage = storage
        self._stopped = threading.Event()

    def read(
        self, key: str, offset: int, length: int, damage: Callable[[pa.Buffer], str | None]
    ) -> pa.Buffer:
        """Bytes offset..offset+length, in which `damage`, which says what is wrong, finds nothing.

        Raises StorageError with the reason of the last attempt.
        """

        def attempt() -> pa.Buffer:
            self.counters.add(requests=1)
            body = pa.py_buffer(self._storage.get_range(key, offset, length))
            self.counters.add(bytes=len(body))
            if reason := damage(body):
                raise DamagedObjectError(f"{self.url}/{key}: {reason}")
            return body

        return read_again(attempt, self._wait)

    def stop(self) -> None:
        """End reads that pause before another attempt."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections, once no thread reads any more."""
        self._storage.close()

    def _wait(self, pause: float) -> bool:
        stopped = self._stopped.wait(pause)
        self.counters.add(retries=not stopped)
        return stopped
