"""Byte ranges of objects, asked for again when the network or the store fails for a moment.

Each failure is counted, so that a run shows what its store is like. What cannot get better is an
error at once: an object that is not there, a denied access.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

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


class DamagedObjectError(StorageError):
    """The one line of bytes that are not what was written, however often they are read."""


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
        damaged = 0
        for attempt in range(1, ATTEMPTS + 1):
            self.counters.add(requests=1)
            try:
                body = pa.py_buffer(self._storage.get_range(key, offset, length))
            except (MissingObjectError, AccessDeniedError):
                raise
            except StorageError as error:
                reason = str(error)
            else:
                self.counters.add(bytes=len(body))
                reason = damage(body)
                if reason is None:
                    return body
                reason = f"{self.url}/{key}: {reason}"
                damaged += 1
            if damaged == DAMAGED_ATTEMPTS:
                raise DamagedObjectError(f"{reason} ({attempt} attempts)")
            if attempt == ATTEMPTS or self._pause(attempt - damaged):
                break
            self.counters.add(retries=1)
        raise StorageError(f"{reason} ({attempt} attempts)")

    def stop(self) -> None:
        """End reads that pause before another attempt."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections, once no thread reads any more."""
        self._storage.close()

    def _pause(self, failures: int) -> bool:
        """Wait after so many requests without bytes; True when stopped meanwhile."""
        pause = min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
        # Workers that failed together must not come back together.
        return self._stopped.wait(pause * random.uniform(0.5, 1.5))
