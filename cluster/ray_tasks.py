"""Many Ray tasks, a few under way at a time, with a progress bar over what they get through."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import ray
from tqdm import tqdm

from cluster.progress import PlainProgress

CANCEL_TIMEOUT_S = 10


def run_tasks(task: Any, calls: Iterable[tuple]) -> Iterator[Any]:
    """Results of `task.remote(*call)` for all calls, as they finish.

    Two tasks a core are under way at most, so that calls and results never pile up. A task's
    exception is raised as it is, once the others, which are cancelled, write nothing any more.
    """
    waiting = iter(calls)
    running: list[ray.ObjectRef] = []
    try:
        while True:
            while len(running) < 2 * _cores() and (call := next(waiting, None)) is not None:
                running.append(task.remote(*call))
            if not running:
                return
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(running, num_returns=len(running), timeout=CANCEL_TIMEOUT_S)


def progress_bar(description: str, total: int) -> tqdm:
    """Counts images: a bar on a terminal, a line now and then in a log."""
    bar = tqdm if sys.stderr.isatty() else PlainProgress
    return bar(total=total, desc=description, unit="image")


def _cores() -> int:
    """Asked again for every task: an autoscaled cluster grows while it works."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
