"""What a sweep shows while it runs: a line a measurement, the best so far, the time left."""

import math
import sys
import time
from contextlib import suppress
from typing import Any

import ray
from ray import tune

from cluster.storage import MissingObjectError, open_storage
from cluster.sweep_records import FAILED, STOPPED, Record, finish_record, read_record
from cluster.sweep_space import Point
from cluster.sweep_trainables import first_name
from cluster.sweep_trial import Plan
from cluster.trial_groups import remove_lost_groups

LOOK_S = 2


class Progress(tune.Callback):
    """Tune's callback, in the sweep's driver: prints, notes how trials end, and frees the cores
    of trials whose own driver is lost."""

    def __init__(self, plan: Plan, title: str, total: int, concurrent: int) -> None:
        self.concurrent = concurrent
        self._plan, self._title, self._total = plan, title, total
        self._began = time.monotonic()
        self._names: dict[str, str] = {}  # of trials, by Tune's id
        self._ended: set[str] = set()
        self._best: Record | None = None
        self._looked = self._began

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._names[trial.trial_id] = result["name"]
        record = read_record(open_storage(self._plan.url, self._plan.base.storage), result["name"])
        reached = record.last(self._plan.objective)
        if not math.isnan(reached) and self._beats(reached):
            self._best = record
        shown = f"step {max(record.measured, key=int)}" if record.measured else ""
        shown += f" {self._plan.objective} {reached:.2f}" if not math.isnan(reached) else ""
        if record.status == FAILED:
            shown = f"failed: {record.reason}"
        self._print(f"{record.name} {shown}")

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if time.monotonic() - self._looked > LOOK_S:
            with suppress(RuntimeError, ray.exceptions.RayError):  # the next look repeats it
                remove_lost_groups()
            self._looked = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial, STOPPED, "stopped at this rung")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        reason = (trial.error_file and trial.get_error()) or "its driver was lost"
        self._end(trial, FAILED, str(reason).strip().splitlines()[-1])

    def _end(self, trial: Any, status: str, reason: str) -> None:
        self._ended.add(trial.trial_id)
        name = self._names.get(trial.trial_id) or first_name(trial.config, self._plan)
        with suppress(MissingObjectError):  # lost before it wrote its record
            store = open_storage(self._plan.url, self._plan.base.storage)
            finish_record(store, name, status, reason)
        if status == FAILED:
            self._print(f"{name} failed: {reason}")

    def _beats(self, value: float) -> bool:
        if self._best is None:
            return True
        best = self._best.last(self._plan.objective)
        return value < best if self._plan.mode == "min" else value > best

    def _print(self, line: str) -> None:
        shown = [f"[{self._title} {len(self._ended)}/{self._total}] {line}"]
        if self._best is not None:
            best = self._best.last(self._plan.objective)
            shown.append(f"best {best:.2f} ({describe(self._best.point)})")
        if self._ended:
            each = (time.monotonic() - self._began) / len(self._ended)
            left = each * max(self._total - len(self._ended), 0)
            shown.append(f"{_duration(left)} left")
        print(" | ".join(shown), file=sys.stderr, flush=True)


def describe(point: Point) -> str:
    """A point in one line: keys without their section, numbers to three digits."""
    if not point:
        return "the sweep's own configuration"
    shown = {key.rpartition(".")[2]: value for key, value in point.items()}
    return " ".join(f"{key}={number(value)}" for key, value in shown.items())


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
