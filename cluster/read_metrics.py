"""What reading data cost: sums that workers add up, and the figures a run shows."""

from __future__ import annotations

import time

from cluster.ranges import ReadCounters

COUNTED = ("bytes", "requests", "retries", "samples", "cache_hits")


class ReadMetrics:
    """Collects one worker's sums between two looks."""

    def __init__(self, counters: ReadCounters) -> None:
        self._counters = counters
        self._reset()

    def add_step(self, queued: float, waited: float) -> None:
        """A step found `queued` batches ready and waited so many seconds for its own."""
        self._steps += 1
        self._queued += queued
        self._waited += waited

    def take(self) -> list[float]:
        """The sums since the previous call, to be added to those of the other workers."""
        seconds = time.monotonic() - self._since
        counted = self._counters.take()
        sums = [1.0, seconds, self._waited, self._steps, self._queued]
        self._reset()
        return sums + [float(counted[name]) for name in COUNTED]

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._steps, self._queued, self._waited = 0, 0.0, 0.0


def summarize(sums: list[float]) -> dict[str, float]:
    """The figures of all workers together from the sum of what they took.

    Bytes, requests and retries are those of the whole run; the depth of the queue (batches) and
    the share of time spent waiting are a worker's on average.
    """
    workers, seconds, waited, steps, queued = sums[:5]
    counted = dict(zip(COUNTED, sums[5:], strict=True))
    elapsed = max(seconds / workers, 1e-9)
    return {
        "data_bytes_per_second": counted["bytes"] / elapsed,
        "data_requests_per_second": counted["requests"] / elapsed,
        "data_retries": counted["retries"],
        "data_cache_hit_share": counted["cache_hits"] / max(counted["samples"], 1),
        "data_queue_depth": queued / max(steps, 1),
        "data_wait_share": waited / max(seconds, 1e-9),
    }


def shown(figures: dict[str, float]) -> dict[str, str]:
    """What `summarize` found, as a progress bar shows it."""
    return {
        "data wait": f"{figures['data_wait_share']:.0%}",
        "queue": f"{figures['data_queue_depth']:.1f}",
        "MB/s": f"{figures['data_bytes_per_second'] / 1e6:.1f}",
        "requests/s": f"{figures['data_requests_per_second']:.0f}",
        "retries": f"{figures['data_retries']:.0f}",
        "cache hits": f"{figures['data_cache_hit_share']:.0%}",
    }
