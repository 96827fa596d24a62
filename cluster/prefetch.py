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
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa

from cluster.reader import ShardReader

# Threads that wait for object storage: enough to hide its latency, and they cost no CPU.
REQUESTS_IN_FLIGHT = 32
# The wide window, in encoded bytes and in samples; it is filled again when it is half empty.
BUDGET_BYTES = 12 << 20
WINDOW = 256
# Work taken from the sequence at a time: what lies side by side in it is read by one request.
MERGE_WINDOW = 64
MERGE_BYTES = 2 << 20
# Reading over it takes a connection of 85 MB/s 3 ms, less than a store takes to answer a request.
MERGE_GAP = 256 << 10

T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """Samples to read, and what makes a result of their bytes, in the same order."""

    reads: list[tuple[ShardReader, int]]
    prepare: Callable[..., T]


class _Payload(NamedTuple):
    """A sample's bytes: their place in a request's answer, and its share of what that holds."""

    request: Future[list[pa.Buffer]]
    place: int
    nbytes: int


@dataclass
class _Pending(Generic[T]):
    work: Work[T]
    payloads: list[_Payload]

    @property
    def nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)

    def run(self) -> T:
        return self.work.prepare(*(p.request.result()[p.place] for p in self.payloads))


class Prefetcher(Iterator[T]):
    """The results of a sequence of work, in order, up to `ahead` of them prepared in advance."""

    def __init__(self, works: Iterable[Work[T]], *, threads: int, ahead: int) -> None:
        self._works = iter(works)
        self._ahead = ahead
        self._fetchers = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="fetch")
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._requests: deque[Future] = deque()
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
        while len(self._decoding) < self._ahead and (self._fetching or self._request_more()):
            pending = self._fetching.popleft()
            self._nbytes -= pending.nbytes
            self._decoding.append(self._decoders.submit(pending.run))
        room = self._fullness() <= 0.5
        while self._requests_in_flight() < REQUESTS_IN_FLIGHT and room:
            room = self._request_more() and self._fullness() < 1

    def _fullness(self) -> float:
        return max(self._nbytes / BUDGET_BYTES, len(self._fetching) / WINDOW)

    def _requests_in_flight(self) -> int:
        while self._requests and self._requests[0].done():
            self._requests.popleft()
        return len(self._requests)

    def _request_more(self) -> bool:
        """Ask for the next work's bytes, as much as is looked at together; False at the end."""
        works, nbytes = [], self._nbytes
        for work in islice(self._works, MERGE_WINDOW):
            works.append(work)
            nbytes += _nbytes(work)
            if nbytes >= BUDGET_BYTES:
                break
        payloads = {}
        for reader, indices in merge_neighbours(read for work in works for read in work.reads):
            request = self._fetchers.submit(reader.fetch, indices)
            self._requests.append(request)
            begin, end = reader.manifest.span(indices)
            share = (end - begin) // len(indices)  # of the gaps too, which are held as long
            for place, index in enumerate(indices):
                payloads[reader, index] = _Payload(request, place, share)
        for work in works:
            pending = _Pending(work, [payloads[read] for read in work.reads])
            self._nbytes += pending.nbytes
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
