"""What reading cost, of all workers together."""

import threading

import numpy as np
import pytest

from cluster import read_metrics
from cluster.ranges import ReadCounters
from cluster.read_metrics import ReadMetrics, shown, summarize


@pytest.fixture
def clock(monkeypatch):
    """The time that the metrics see, in seconds."""
    now = [100.0]
    monkeypatch.setattr(read_metrics.time, "monotonic", lambda: now[0])
    return now


def test_workers_add_up_and_shares_are_a_worker_s(clock):
    workers = []
    for queued, waited, read in ((4.0, 0.5, 1000), (2.0, 1.5, 3000)):
        counters = ReadCounters()
        workers.append(ReadMetrics(counters))
        counters.add(bytes=read, requests=10, retries=1, samples=8, cache_hits=2)
        for _ in range(2):
            workers[-1].add_step(queued, waited)
    clock[0] += 10
    assert summarize(np.sum([worker.take() for worker in workers], axis=0).tolist()) == {
        "data_bytes_per_second": 400.0,
        "data_requests_per_second": 2.0,
        "data_retries": 2.0,
        "data_cache_hit_share": 0.25,
        "data_queue_depth": 3.0,
        "data_wait_share": pytest.approx((0.1 + 0.3) / 2),
    }


def test_a_progress_bar_shows_all_of_it(clock):
    counters = ReadCounters()
    metrics = ReadMetrics(counters)
    counters.add(bytes=12_300_000, requests=40, retries=3, samples=8, cache_hits=2)
    metrics.add_step(1.0, 0.5)
    metrics.add_step(4.0, 0.0)
    clock[0] += 2
    assert shown(summarize(metrics.take())) == {
        "data wait": "25%",
        "queue": "2.5",
        "MB/s": "6.2",
        "requests/s": "20",
        "retries": "3",
        "cache hits": "25%",
    }


def test_every_look_starts_anew(clock):
    counters = ReadCounters()
    metrics = ReadMetrics(counters)
    counters.add(bytes=500, requests=1)
    metrics.add_step(1.0, 2.0)
    clock[0] += 5
    metrics.take()
    clock[0] += 5
    assert set(summarize(metrics.take()).values()) == {0.0}


def test_no_count_of_a_thread_is_lost():
    counters = ReadCounters()
    threads = [
        threading.Thread(target=lambda: [counters.add(requests=1, bytes=3) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.take() == {"requests": 8000, "bytes": 24000}
