"""Work that runs ahead of its consumer: bytes fetched by many requests, decoding in threads.

Two windows lie before the consumer. The narrow one holds results, decoded or about to be: always as
many as were asked for, however large they are. The wide one, behind it, holds bytes, a tenth as
large, asked for or there, up to a budget: it hides the store's latency. Both move only when the
consumer takes a result, and results come strictly in order. Threads, not processes, decode: torch
and the store's client release the GIL, so no sample is copied between processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import pyarrow as pa

from cluster.hardware import share_heaps
from cluster.reader import ShardReader

# Threads that wait for object storage: a store that takes 50 ms sends 70 MB/s, some 360 samples, to
# so many. Twice as many take 15 MB and a tenth of the CPU time of reading more.
REQUESTS_IN_FLIGHT = 16
# The wide window, in bytes of samples, to which the gaps between them come, and in works. What it
# asks for at once is read by one request where it lies side by side, so it is filled again only
# when a quarter of what it holds is left.
BUDGET_BYTES = 28 << 20
WINDOW = 256
REFILL = 0.25
MERGE_BYTES = 2 << 20
# Reading over it takes a connection of 85 MB/s 3 ms, less than a store takes to answer a request.
MERGE_GAP = 256 << 10

T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """Samples to read, and what makes a result of their bytes, in the same order."""

    reads: list[tuple[ShardReader, int]]
    prepare: Callable[..., T]


@dataclass
class _Request:
    """The bytes of one range, asked for or there; they count until the last sample is taken."""

    bodies: Future[list[pa.Buffer]]
    nbytes: int  # with the gaps that are read over
    waiting: int = 0


@dataclass
class _Pending(Generic[T]):
    work: Work[T]
    payloads: list[tuple[_Request, int]]  # and the sample's place in it

    def run(self) -> T:
        return self.work.prepare(*(request.bodies.result()[i] for request, i in self.payloads))


class Prefetcher(Iterator[T]):
    """The results of a sequence of work, in order, up to `ahead` of them prepared in advance."""

    def __init__(self, works: Iterable[Work[T]], *, threads: int, ahead: int) -> None:
        share_heaps()  # the heaps of so many threads would keep 15 MB
        self._works = iter(works)
        self._ahead = ahead
        self._fetchers = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="fetch")
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._fetching: deque[_Pending[T]] = deque()
        self._decoding: deque[Future[T]] = deque()
        self._nbytes = 0  # of the wide window
        self.wait_seconds = 0.0

    @property
    def ready(self) -> int:
        """Results that are there already."""
        return sum(future.done() for future in self._decoding)

    def __next__(self) -> T:
        self._fill()
        if not self._decoding:
            raise StopIteration
        future = self._decoding.popleft()
        begin = time.perf_counter()
        result = future.result()
        self.wait_seconds += time.perf_counter() - begin
        return result

    def close(self) -> None:
        """Drop what was prepared ahead; returns when no thread is left."""
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        # A decoder may wait for a request that was just cancelled: that ends it too.
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=True)
        self._fetching.clear()
        self._decoding.clear()

    def _fill(self) -> None:
        # Where nothing is there yet, what is due first does not wait for what comes after it.
        while len(self._decoding) < self._ahead and (self._fetching or self._request(self._ahead)):
            self._decoding.append(self._decoders.submit(self._take().run))
        if max(self._nbytes / BUDGET_BYTES, len(self._fetching) / WINDOW) <= REFILL:
            self._request(WINDOW - len(self._fetching))

    def _take(self) -> _Pending[T]:
        """The first work of the wide window, which leaves it."""
        pending = self._fetching.popleft()
        for request, _ in pending.payloads:
            request.waiting -= 1
            if not request.waiting:
                self._nbytes -= request.nbytes
        return pending

    def _request(self, most: int) -> bool:
        """Ask for the next works, `most` at most, until they fill the budget; False if none."""
        works, nbytes = [], self._nbytes
        for work in islice(self._works, most):
            works.append(work)
            nbytes += _nbytes(work)
            if nbytes >= BUDGET_BYTES:
                break
        payloads = {}
        for reader, indices in merge_neighbours(read for work in works for read in work.reads):
            begin, end = reader.manifest.span(indices)
            request = _Request(self._fetchers.submit(reader.fetch, indices), end - begin)
            self._nbytes += request.nbytes
            for place, index in enumerate(indices):
                payloads[reader, index] = request, place
        for work in works:
            pending = _Pending(work, [payloads[read] for read in work.reads])
            for request, _ in pending.payloads:
                request.waiting += 1
            self._fetching.append(pending)
        return bool(works)


def merge_neighbours(
    reads: Iterable[tuple[ShardReader, int]],
) -> list[tuple[ShardReader, list[int]]]:
    """Group reads that one request serves: neighbours in a shard, each once, sorted by place.

    The groups come in the order in which their first sample is wanted.
    """
    wanted: dict[tuple[ShardReader, int], int] = {}
    for turn, read in enumerate(reads):
        wanted.setdefault(read, turn)
    groups: list[tuple[ShardReader, list[int]]] = []

    def place(read: tuple[ShardReader, int]) -> tuple[int, int, int]:
        reader, index = read
        return id(reader), reader.manifest.shard[index], reader.manifest.offsets[index]

    for reader, index in sorted(wanted, key=place):
        if groups and groups[-1][0] is reader and _joins(reader, groups[-1][1], index):
            groups[-1][1].append(index)
        else:
            groups.append((reader, [index]))
    return sorted(groups, key=lambda group: min(wanted[group[0], i] for i in group[1]))


def _joins(reader: ShardReader, group: list[int], index: int) -> bool:
    manifest = reader.manifest
    if manifest.shard[index] != manifest.shard[group[-1]]:
        return False
    end = manifest.offsets[index] + manifest.lengths[index]
    gap = manifest.offsets[index] - manifest.offsets[group[-1]] - manifest.lengths[group[-1]]
    return gap <= MERGE_GAP and end - manifest.offsets[group[0]] <= MERGE_BYTES


def _nbytes(work: Work) -> int:
    return sum(int(reader.manifest.lengths[index]) for reader, index in work.reads)
