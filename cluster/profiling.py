"""Where the time of a step goes: `python -m jobs.train --profile`.

Rank 0 measures a few steps after the first ones, whose caches and allocators are cold, and leaves

    profile/step-00000006.txt         the share of each part of a step
    profile/step-00000006.trace.json  a trace for chrome://tracing or https://ui.perfetto.dev

The parts' names stand in the trace too. A part's time is its own, without the parts inside it, so
that they and "other" make the whole step. Nothing is wrapped in a run that is not profiled.
"""

import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cluster.storage import Storage

WARM_UP, MEASURED = 2, 4


class StepProfiler:
    """Call `step_done` after every step; `part` names what a method of an object is for."""

    def __init__(self, run: Storage, device: torch.device) -> None:
        self._run, self._device = run, device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []  # seconds of inner parts, of each part that is under way
        self._steps, self._began = 0, 0.0
        self._wrapped: list[tuple[Any, str]] = []
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def part(self, name: str, owner: Any, method: str) -> None:
        """Count the time in `owner.method` as that of the part `name`."""
        function = getattr(owner, method)
        self._wrapped.append((owner, method))
        setattr(owner, method, functools.wraps(function)(self._timed(name, function)))

    def _timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            self._open.append(0.0)
            try:
                with record_function(name):
                    return function(*args, **kwargs)
            finally:
                seconds = self._now() - began
                self._seconds[name] += seconds - self._open.pop()
                if self._open:
                    self._open[-1] += seconds

        return call

    def _now(self) -> float:
        """A GPU works behind the program: what it was told to do has to be done to be counted."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def step_done(self, done: int) -> str | None:
        """After `done` steps of the run; the table once, when all is measured."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._seconds.clear()
            self._profile.start()
            self._began = self._now()
        if self._steps != WARM_UP + MEASURED:
            return None
        whole = self._now() - self._began
        self._profile.stop()
        for owner, method in self._wrapped:
            delattr(owner, method)  # the class's own method shows again
        table = parts_table(self._seconds, whole, MEASURED)
        self._run.put(f"profile/step-{done:08d}.txt", table.encode())
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(trace))
            self._run.put(f"profile/step-{done:08d}.trace.json", trace.read_bytes())
        return table


def parts_table(seconds: dict[str, float], whole: float, steps: int) -> str:
    """Parts by their share of `whole` seconds of `steps` steps, the largest first."""
    parts = {**seconds, "other": max(whole - sum(seconds.values()), 0.0)}
    width = max(map(len, parts))
    lines = [f"{'part':<{width}}  ms a step   share"]
    for name, spent in sorted(parts.items(), key=lambda part: -part[1]):
        lines.append(f"{name:<{width}}  {1000 * spent / steps:9.1f}  {spent / whole:6.1%}")
    lines.append(f"{'step':<{width}}  {1000 * whole / steps:9.1f}  {1:6.1%}")
    return "\n".join(lines) + "\n"
