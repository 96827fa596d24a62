"""One trial of a sweep: a run in the sweep's folder, trained from stop to stop.

At a stop a trial keeps its workers until Tune, which decides at once, lets it go on or ends it. A
member of a population waits there for the others, who may need its cores: it gives them back.

    SWEEP/prefix/DIGEST      the warm-up that trials share: a run that ends at the contrast's start
    SWEEP/trials/NAME        a trial's run, forked from it
    SWEEP/records/NAME.json  what is known of a trial, or of a warm-up

A trial is named after what it computes, and its measurements are read from its run. Asked for
again, after a lost driver, it goes on where it was and repeats nothing.
"""

import json
import math
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray import tune

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig, ValidationConfig
from cluster.pausing import PausingTraining, train_alone
from cluster.run_config import FORKABLE, prefix_digest
from cluster.storage import MissingObjectError, open_storage
from cluster.sweep_records import (
    FAILED,
    FINISHED,
    REPLACED,
    RUNNING,
    STOPPED,
    WARM_UP,
    Record,
    finish_record,
    read_record,
    read_records,
    trial_name,
)
from cluster.sweep_space import Point, Space, with_values
from cluster.telemetry import METRICS
from sepico.schedule import contrast_start_step

FORK = "fork.json"


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


class TrialTrainable(tune.Trainable):
    """Trains a trial to each stop, as long as Tune lets it, with the same workers.

    Tune gives `setup` a drawn point of the space, or {"trial": (point, seed)}. A trial that cannot
    go on reports NaN and ends; why is in its record.
    """

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        self._plan = plan
        self._trial: Trial | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin with another trial, while the workers of the last one end."""
        if self._trial is not None:
            threading.Thread(target=self._trial.end, daemon=True).start()
        plan = self._plan
        drawn = plan.space.cut(new_config, plan.base), plan.base.seed
        self._trial = Trial(plan, *new_config.get("trial", drawn))
        self._left = list(enumerate(plan.stops))
        self._was_stopped = self._trial.record.status == STOPPED
        return True

    def step(self) -> dict[str, Any]:
        i, stop = self._left.pop(0)
        metrics = self._trial.train_to(stop, self._plan.stops)
        record = self._trial.record
        # Of a trial that was stopped before, a sweep with one stop wants what is left of it.
        known = [step for _, step in self._left if str(step) in record.measured]
        ended = self._was_stopped and len(self._plan.stops) > 1 and not known
        return {
            **metrics,
            "name": record.name,
            "budget": self._plan.reduction**i,
            "done": record.status == FAILED or not self._left or ended,
        }

    def cleanup(self) -> None:
        self._trial.end()


def run_member(parameters: dict[str, Any], plan: Plan) -> None:
    """Tune's trainable for population-based training: a chain of runs.

    A member that takes over another's state gets that one's checkpoint from Tune, a file with the
    URL of the run's own checkpoint, and goes on from there as a fork with other values.
    """
    member = parameters["member"]
    sweep = open_storage(plan.url, plan.base.storage)
    name, fork = tune.get_context().get_trial_name(), member["fork"]
    point = plan.space.cut(member["point"], plan.base)
    done = int(fork.rpartition("/step-")[2][:8]) if fork else 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = json.loads(Path(folder, FORK).read_text())
        fork, done = state["fork"], state["step"]
        for record in (record for record in read_records(sweep) if record.member == name):
            if record.run == state["run"] and record.point == point:
                fork = record.fork  # its own: it was only paused
            elif record.status == RUNNING and record.run != state["run"]:
                finish_record(sweep, record.name, REPLACED, f"took over {state['run']}")
    trial = Trial(plan, point, plan.base.seed, fork, name)
    for i, step in enumerate(plan.stops):
        if step <= done:
            continue
        metrics = trial.train_to(step, [step])
        if trial.record.status == FAILED:
            # Tune leaves NaN out of a population; the worst takes over the state of the best.
            metrics = {plan.objective: -math.inf if plan.mode == "max" else math.inf}
        with tempfile.TemporaryDirectory() as folder:
            state = {"fork": trial.checkpoint(), "step": step, "run": trial.record.run}
            Path(folder, FORK).write_text(json.dumps(state))
            metrics |= {"name": trial.record.name, "budget": i + 1}
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
        if trial.record.status == FAILED:
            return


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

    def train_to(self, step: int, stops: list[int]) -> dict[str, float]:
        """Train to a step and measure there, unless that was done; returns what was measured, the
        objective NaN if the trial failed. The workers wait at each of `stops` but the last."""
        record = self.record
        if str(step) not in record.measured:
            record.status = RUNNING
            record.write(self._sweep)
            try:
                self._train(step, stops)
                record.measured[str(step)] = self._measured(step)
                if step == self._config.optimization.steps:
                    record.status = FINISHED
            except (ValueError, RuntimeError) as error:
                record.status, record.reason = FAILED, " ".join(str(error).split())
            record.write(self._sweep)
        return {self._plan.objective: math.nan, **record.measured.get(str(step), {})}

    def _train(self, step: int, stops: list[int]) -> None:
        done = list_checkpoints(self._run)
        if done and done[-1].step >= step:
            return
        if self._training is None:
            config = replace(self._config, fork=self._fork or self._warm_up())
            self._spent = self.record.worker_seconds
            self._training = PausingTraining(config, stops)
        training = self._training
        try:
            training.go_on(step)
        finally:
            self.record.worker_seconds = self._spent + training.worker_seconds
            if step == stops[-1]:
                self._training = None

    def end(self) -> None:
        """Let the workers of a trial that waits at a stop end, and note what they cost."""
        if self._training is None:
            return
        self._training.end()
        record = read_record(self._sweep, self.record.name)  # how it ended is noted meanwhile
        record.worker_seconds = self._spent + self._training.worker_seconds
        record.write(self._sweep)

    def checkpoint(self) -> str:
        """URL of the run's newest checkpoint; empty if it has none."""
        found = list_checkpoints(self._run)
        return f"{self._run.url}/{found[-1].prefix}" if found else ""

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
        seconds = train_alone(shared, plan.start)
        run = open_storage(shared.run, shared.storage)
        if seconds:
            Record(
                f"prefix-{digest}", shared.run, kept, config.seed, WARM_UP, worker_seconds=seconds
            ).write(self._sweep)
        (checkpoint,) = (c for c in list_checkpoints(run) if c.step == plan.start)
        return f"{run.url}/{checkpoint.prefix}"
