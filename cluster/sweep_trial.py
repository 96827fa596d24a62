"""One trial of a sweep: a run in the sweep's folder, trained from stop to stop.

    SWEEP/prefix/DIGEST      the warm-up that trials share: a run that ends at the contrast's start
    SWEEP/trials/NAME        a trial's run, forked from it
    SWEEP/records/NAME.json  what is known of a trial, or of a warm-up

A trial is named after what it computes, and its measurements are read from its run. Asked for
again, after a lost driver, it goes on where it was and repeats nothing.
"""

import json
import math
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from ray.exceptions import RayError

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig, ValidationConfig
from cluster.pausing import PausingTraining
from cluster.run_config import FORKABLE, METRICS, load_config, prefix_digest
from cluster.storage import MissingObjectError, Storage, open_storage
from cluster.sweep_records import (
    FAILED,
    FINISHED,
    RUNNING,
    WARM_UP,
    Record,
    read_record,
    trial_name,
)
from cluster.sweep_space import Point, Space, with_values
from sepico.schedule import contrast_start_step


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common."""

    url: str
    base: TrainConfig  # resolved
    space: Space
    objective: str
    stops: list[int]  # steps after which a trial is measured and may end
    reduction: int  # one trial in so many passes a stop
    warm_up: Point | None  # what the shared warm-ups keep for all trials; None shares none

    @property
    def mode(self) -> Literal["min", "max"]:
        return "min" if self.objective.endswith("entropy") else "max"

    @property
    def start(self) -> int:
        """First step with contrast, where trials fork."""
        return contrast_start_step(self.base.contrast.start, self.base.optimization)


class Trial:
    """A trial's run and its record."""

    def __init__(
        self, plan: Plan, point: Point, seed: int, fork: str = "", member: str = ""
    ) -> None:
        self._plan, self._fork = plan, fork
        self._sweep = open_storage(plan.url, plan.base.storage)
        name = trial_name(point, seed, fork)
        config = replace(with_values(plan.base, point), seed=seed)
        self._config = replace(config, run=f"{plan.url}/trials/{name}")
        self._run = open_storage(self._config.run, plan.base.storage)
        self._training: PausingTraining | None = None
        self.record = Record(name, self._config.run, point, seed, fork=fork, member=member)
        with suppress(MissingObjectError):
            self.record = read_record(self._sweep, name)
        if self.record.status == FAILED:  # asked for again, it tries again
            self.record.status, self.record.reason = RUNNING, ""

    def train_to(self, step: int, stops: list[int]) -> dict[str, float]:
        """Train to a step and measure there, unless that was done; returns what was measured, the
        objective NaN if the trial failed. The workers wait at each of `stops` but the last."""
        if str(step) not in self.record.measured:
            self._note(status=RUNNING, reason="")
            try:
                self._train(step, stops)
                measured = {str(step): self._measured(step)}
                finished = step == self._config.optimization.steps
                self._note(measured, status=FINISHED if finished else RUNNING)
            except RayError:  # a lost node is Tune's to begin again
                raise
            except Exception as error:
                shown = isinstance(error, ValueError | RuntimeError | OSError)
                if not shown:
                    traceback.print_exc()
                reason = str(error) if shown else repr(error)
                self._note(status=FAILED, reason=" ".join(reason.split()))
            if step == stops[-1]:
                self._training = None
        return {self._plan.objective: math.nan, **self.record.measured.get(str(step), {})}

    def _note(self, measured: dict[str, dict[str, float]] | None = None, **changed: Any) -> None:
        """Change the record, which another process may have changed since it was read."""
        with suppress(MissingObjectError):
            warm_up = self.record.warm_up
            self.record = read_record(self._sweep, self.record.name)
            self.record.warm_up = warm_up
        self.record.measured |= measured or {}
        if self._training is not None:
            self.record.worker_seconds += self._training.take_worker_seconds()
        for name, value in changed.items():
            setattr(self.record, name, value)
        self.record.write(self._sweep)

    def _train(self, step: int, stops: list[int]) -> None:
        done = list_checkpoints(self._run, skip_damaged=True)
        if done and done[-1].step >= step:
            return
        if self._training is None:
            # What a run began from is history, and of a moved sweep it is not there any more.
            fork = load_config(self._run)["fork"] if done else self._fork or self._warm_up()
            config = replace(self._config, fork=fork)
            self._training = PausingTraining(config, stops)
        self._training.train_to(step)

    def end(self) -> None:
        """Let the workers of a trial that waits at a stop end, and note what they cost."""
        if self._training is not None:
            self._training.end()
            self._note()

    def checkpoint(self, step: int) -> str:
        """URL of the run's checkpoint of a step; empty if there is none."""
        return _checkpoint(self._run, step)

    def _measured(self, step: int) -> dict[str, float]:
        """The validation after `step` steps, from the run's metrics."""
        lines = map(json.loads, self._run.get(METRICS).splitlines())
        of_step = [line for line in lines if line["step"] == step - 1]
        metrics = {key: value for line in of_step for key, value in line.items()}
        wanted = {key for key in metrics if key.startswith(("student_", "teacher_"))}
        if self._plan.objective not in wanted:
            raise ValueError(f"step {step} of {self._run.url} has no {self._plan.objective}")
        return {key: metrics[key] for key in sorted(wanted)}

    def _warm_up(self) -> str:
        """URL of the checkpoint to fork from, trained first by whoever needs it first."""
        plan, config = self._plan, self._config
        within = 0 < plan.start < config.optimization.steps
        if plan.warm_up is None or not within or config.method == "source_only":
            return ""
        kept = {key: value for key, value in self.record.point.items() if key not in FORKABLE}
        shared = replace(with_values(plan.base, kept | plan.warm_up), seed=config.seed)
        shared = replace(shared, validation=ValidationConfig())
        digest = prefix_digest(shared)
        shared = replace(shared, run=f"{plan.url}/prefix/{digest}")
        self.record.warm_up = f"prefix-{digest}"
        run = open_storage(shared.run, shared.storage)
        seconds = 0.0
        if not _checkpoint(run, plan.start):
            training = PausingTraining(shared, [plan.start])
            training.train_to(plan.start)
            seconds = training.take_worker_seconds()
        if seconds:
            Record(
                f"prefix-{digest}", shared.run, kept, config.seed, WARM_UP, worker_seconds=seconds
            ).write(self._sweep)
        return _checkpoint(run, plan.start)


def _checkpoint(run: Storage, step: int) -> str:
    """URL of a run's checkpoint of a step; empty if there is none."""
    found = list_checkpoints(run, skip_damaged=True)
    return next((f"{run.url}/{c.prefix}" for c in reversed(found) if c.step == step), "")
