"""One trial of a sweep: a run in the sweep's folder, trained from stop to stop.

Between stops nothing of a trial runs but its driver, which holds no core: a trial that is stopped
there leaves no worker and no placement group, and one that waits for workers holds none.

    SWEEP/prefix/DIGEST      the warm-up that trials share: a run that ends at the contrast's start
    SWEEP/trials/NAME        a trial's run, forked from it
    SWEEP/records/NAME.json  what is known of a trial, or of a warm-up

A trial is named after what it computes, and its measurements are read from its run. Asked for
again, after a lost driver, it goes on where it was and repeats nothing.
"""

import json
import math
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import xxhash
from ray import tune

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig, ValidationConfig
from cluster.lease import LeaseError
from cluster.run_config import FORKABLE, prefix_digest
from cluster.storage import MissingObjectError, Storage, open_storage
from cluster.sweep_space import Point, Space, with_values
from cluster.telemetry import METRICS
from cluster.training import train
from sepico.schedule import contrast_start_step

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
WARM_UP = "warm-up"
REPLACED = "replaced"  # a member of a population that took over another's state
RECORDS = "records"
FORK = "fork.json"
POLL_S = 2


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


@dataclass
class Record:
    """What is known of a trial."""

    name: str
    run: str
    point: Point
    seed: int
    status: str = RUNNING
    reason: str = ""
    fork: str = ""  # checkpoint that a member of a population began from; empty: the warm-up's
    warm_up: str = ""  # record of the warm-up that it forked from
    member: str = ""  # of a population
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # by step
    worker_seconds: float = 0.0  # from asking for workers to their end, times their number
    updated: float = 0.0  # seconds since the epoch

    @property
    def is_trial(self) -> bool:
        return self.status != WARM_UP

    def last(self, objective: str) -> float:
        """The objective at the last stop, NaN if there is none."""
        if self.status == FAILED or not self.measured:
            return math.nan
        return self.measured[max(self.measured, key=int)].get(objective, math.nan)

    def write(self, sweep: Storage) -> None:
        self.updated = time.time()
        sweep.put(f"{RECORDS}/{self.name}.json", json.dumps(asdict(self), indent=1).encode())


def read_records(sweep: Storage) -> list[Record]:
    """All records, oldest change first; those of warm-ups too."""
    keys = sweep.list(RECORDS)
    return sorted((Record(**json.loads(sweep.get(key))) for key in keys), key=lambda r: r.updated)


def read_record(sweep: Storage, name: str) -> Record:
    """A trial's record. Raises MissingObjectError if there is none."""
    return Record(**json.loads(sweep.get(f"{RECORDS}/{name}.json")))


def finish_record(sweep: Storage, name: str, status: str, reason: str) -> None:
    """Note how a trial ended that did not end by itself."""
    record = read_record(sweep, name)
    if record.status == RUNNING:
        record.status, record.reason = status, reason
        record.write(sweep)


def trial_name(point: Point, seed: int, fork: str = "") -> str:
    digest = xxhash.xxh3_64_hexdigest(json.dumps([point, fork], sort_keys=True).encode())
    return f"{digest[:8] if point or fork else 'default'}-seed{seed}"


def run_trial(parameters: dict[str, Any], plan: Plan) -> None:
    """Tune's trainable: train to each stop, report, go on as long as Tune lets it.

    `parameters` are a drawn point of the space, or {"trial": (point, seed)}. A trial that cannot
    go on reports NaN and ends; why is in its record.
    """
    drawn = plan.space.cut(parameters, plan.base), plan.base.seed
    trial = Trial(plan, *parameters.get("trial", drawn))
    ended = trial.record.status
    for i, step in enumerate(plan.stops):
        # Where there is one stop, the sweep wants of a stopped trial what is left of it.
        if ended == STOPPED and len(plan.stops) > 1 and str(step) not in trial.record.measured:
            return
        metrics = trial.train_to(step)
        tune.report({**metrics, "name": trial.record.name, "budget": plan.reduction**i})
        if trial.record.status == FAILED:
            return


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
        metrics = trial.train_to(step)
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
        self.record = Record(name, self._config.run, point, seed, fork=fork, member=member)
        with suppress(MissingObjectError):
            self.record = read_record(self._sweep, name)

    def train_to(self, step: int) -> dict[str, float]:
        """Train to a step and measure there, unless that was done; returns what was measured, the
        objective NaN if the trial failed."""
        record = self.record
        if str(step) not in record.measured:
            record.status = RUNNING
            record.write(self._sweep)
            try:
                config = replace(self._config, fork=self._fork or self._warm_up())
                record.worker_seconds += _train_alone(config, step)
                record.measured[str(step)] = self._measured(step)
                if step == config.optimization.steps:
                    record.status = FINISHED
            except (ValueError, RuntimeError) as error:
                record.status, record.reason = FAILED, " ".join(str(error).split())
            record.write(self._sweep)
        return {self._plan.objective: math.nan, **record.measured.get(str(step), {})}

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
        seconds = _train_alone(shared, plan.start)
        run = open_storage(shared.run, shared.storage)
        if seconds:
            Record(
                f"prefix-{digest}", shared.run, kept, config.seed, WARM_UP, worker_seconds=seconds
            ).write(self._sweep)
        (checkpoint,) = (c for c in list_checkpoints(run) if c.step == plan.start)
        return f"{run.url}/{checkpoint.prefix}"


def _train_alone(config: TrainConfig, until: int) -> float:
    """Train a run up to a step, or wait for another trial that does; returns its worker-seconds."""
    run = open_storage(config.run, config.storage)
    while True:
        done = list_checkpoints(run)
        if done and done[-1].step >= until:
            return 0.0
        began = time.monotonic()
        try:
            train(config, until)
            return (time.monotonic() - began) * config.worker_range.max
        except LeaseError:
            time.sleep(POLL_S)
