"""A run's progress bar: rank 0 tells a small actor how far it is, and the driver, which owns the
terminal, draws what the actor says. As it outlives the workers, it publishes for alerts when the
run last got further. Workers that pause ask it whether to go on.

Nothing heavy is imported here: the actor's process starts with every group of workers.
"""

import asyncio
import sys
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from cluster.events import log_event
from cluster.prometheus import RunGauges


@ray.remote(num_cpus=0)
class ProgressActor:
    """Holds the latest progress of a run and, of one that pauses, whether it goes on."""

    def __init__(self, run: str) -> None:
        self._gauges = RunGauges(run)
        self._furthest = 0
        self._latest: dict[str, Any] = {}
        self._events: list[tuple[str, str, dict[str, Any]]] = []
        self._hung: dict[tuple[int, str], list[int]] = {}
        self._end_reason = ""
        self._pauses = asyncio.Condition()
        self._arrived = self._allowed = -1
        self._ends = False
        self._verdicts: dict[int, bool] = {}
        self._saved = asyncio.Event()
        self._saved.set()
        self._asked = (-1, False)
        self._due: int | None = None  # the step of the checkpoint that is asked for

    def expect_steps(self) -> None:
        """From now on steps and checkpoints are due, for alerts."""
        self._note_time("progress", "checkpoint")

    def _note_time(self, *names: str) -> None:
        self._gauges.set({f"{name}_time_seconds": time.time() for name in names})

    def update(self, done: int, total: int, shown: dict[str, str]) -> None:
        if done > self._furthest:  # steps that a restart repeats are no progress
            self._furthest = done
            self._note_time("progress")
        self._latest = {"done": done, "total": total, "shown": shown}

    def event(self, level: str, name: str, fields: dict[str, Any]) -> None:
        """Log an event at the driver: see `cluster.events`."""
        self._events.append((level, name, fields))

    def hung(self, rank: int, step: int, stacks: str) -> None:
        """Show, in one line for all ranks, that a step hangs and where their stack traces lie."""
        self._hung.setdefault((step, stacks), []).append(rank)

    def end(self, reason: str) -> None:
        """Let the run end at the next start of its workers."""
        self._end_reason = reason

    def end_reason(self) -> str:
        """Why the run ends; empty while it goes on."""
        return self._end_reason

    def latest(self) -> tuple[dict[str, Any], list[tuple[str, str, dict[str, Any]]]]:
        """Progress, and the events since the last call."""
        events, self._events = self._events, []
        for (step, stacks), ranks in self._hung.items():
            named = ", ".join(str(rank) for rank in sorted(ranks))
            message = f"step {step} hangs: stack traces of rank {named} in {stacks}"
            events.append(("warning", "hangs", {"step": step, "message": message}))
        self._hung = {}
        return self._latest, events

    async def save_checkpoint(self) -> None:
        """Ask the workers for a checkpoint; returns once one is committed."""
        self._saved.clear()
        self._due = None
        await self._saved.wait()

    def wants_checkpoint(self, step: int) -> bool:
        """Whether workers that have done `step` steps write a checkpoint: the same for all."""
        if step != self._asked[0]:
            self._asked = step, not self._saved.is_set()
            self._due = step if self._asked[1] else None
        return self._asked[1]

    async def committed(self, step: int, key: str) -> None:
        """A checkpoint is complete, be it one that was begun before it was asked for."""
        if self._due is not None and step >= self._due:
            self._saved.set()
        self._note_time("checkpoint")
        self.event("info", "checkpoint", {"step": step, "key": key})

    async def allow(self, step: int) -> None:
        """Let workers that pause before `step` train on to it."""
        async with self._pauses:
            self._allowed = step
            self._pauses.notify_all()

    async def end_at_pause(self) -> None:
        """Let workers end at the pause where they wait, or at the next one."""
        async with self._pauses:
            self._ends = True
            self._pauses.notify_all()

    async def arrive(self, step: int) -> None:
        """All that is to be known of the run after `step` steps is written."""
        async with self._pauses:
            self._arrived = max(self._arrived, step)
            self._pauses.notify_all()

    async def wait_for_arrival(self, step: int) -> None:
        """Return once the run has arrived at a step."""
        async with self._pauses:
            await self._pauses.wait_for(lambda: self._arrived >= step)

    async def wait_for_verdict(self, step: int) -> bool:
        """Whether workers that pause at `step` train on, once that is known: the same for all."""
        async with self._pauses:
            await self._pauses.wait_for(lambda: self._ends or self._allowed > step)
            return self._verdicts.setdefault(step, not self._ends)


def start_progress(run: str) -> Any:
    """A ProgressActor of the run at a URL, beside the driver: no lost node takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ProgressActor.options(scheduling_strategy=here).remote(run)


class ProgressDisplay:
    """Draws an actor's progress from a thread: a bar on a terminal, plain lines otherwise."""

    def __init__(self, actor: Any, title: str, unit: str) -> None:
        self._actor, self._title, self._unit = actor, title, unit
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressDisplay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        bar, terminal = None, sys.stderr.isatty()
        finished = False
        while not finished:
            finished = self._done.wait(0.5 if terminal else 5.0)
            try:
                latest, events = ray.get(self._actor.latest.remote(), timeout=5)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                continue
            for event in events:
                log_event(*event)
            if not latest:
                continue
            if bar is None:
                bar = self._open(latest["total"], latest["done"], terminal)
            bar.set_postfix(latest["shown"], refresh=False)
            if latest["done"] != bar.n:
                bar.update(latest["done"] - bar.n)
        if bar is not None:
            bar.close()

    def _open(self, total: int, done: int, terminal: bool) -> tqdm:
        if terminal:
            return tqdm(desc=self._title, unit=self._unit, total=total, initial=done)
        return PlainProgress(desc=self._title, unit=self._unit, total=total, initial=done)


class PlainProgress(tqdm):
    """tqdm for logs: a complete line every ten seconds and at the end, no carriage returns."""

    monitor_interval = 0  # tqdm's monitor thread would repeat lines of a slow step

    def __init__(self, **options: Any) -> None:
        options.setdefault("mininterval", 10)
        self._shown = -1
        super().__init__(file=sys.stderr, ascii=True, ncols=0, dynamic_ncols=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n > self.initial and self.n != self._shown:
            self._shown = self.n
            print(self.__str__() if msg is None else msg, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._instances.discard(self)
            self.display()
