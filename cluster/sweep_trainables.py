"""What Ray Tune trains: a trial of a search, or a member of a population.

At a stop a trial keeps its workers until Tune, which decides at once, lets it go on or ends it. A
member of a population waits there for the others, who may need its cores: it gives them back.
"""

import json
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

from ray import tune

from cluster.storage import open_storage
from cluster.sweep_records import (
    FAILED,
    REPLACED,
    RUNNING,
    STOPPED,
    finish_record,
    read_records,
    trial_name,
)
from cluster.sweep_space import Point
from cluster.sweep_trial import Plan, Trial

FORK = "fork.json"


class TrialTrainable(tune.Trainable):
    """Trains a trial to each stop, as long as Tune lets it, with the same workers.

    Tune gives a drawn point of the space, or {"trial": (point, seed)}. A trial that cannot go on
    reports NaN and ends; why is in its record.
    """

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        self._plan, self._parameters = plan, config
        self._trial: Trial | None = None
        self._ends: list[threading.Thread] = []

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin with another trial, while the workers of the last one end."""
        self._end()
        self._parameters = new_config
        return True

    def step(self) -> dict[str, Any]:
        plan = self._plan
        if self._trial is None:
            self._trial = Trial(plan, *_trial(self._parameters, plan))
            measured = self._trial.record.measured
            reached = max(map(int, measured), default=0)
            # One that was trained to the end from an early rung has no answer for those between.
            self._left = [
                (i, stop)
                for i, stop in enumerate(plan.stops)
                if stop > reached or str(stop) in measured
            ]
            self._was_stopped = self._trial.record.status == STOPPED
        i, stop = self._left.pop(0)
        metrics = self._trial.train_to(stop, plan.stops)
        record = self._trial.record
        # A trial that a search stopped answers what it has; training to the end has one stop.
        more = any(str(step) in record.measured for _, step in self._left)
        told = self._was_stopped and len(plan.stops) > 1 and not more
        done = record.status == FAILED or not self._left or told
        if done:
            self._end()
        return {**metrics, "name": record.name, "budget": plan.reduction**i, "done": done}

    def cleanup(self) -> None:
        self._end()
        for thread in self._ends:
            thread.join()

    def _end(self) -> None:
        if self._trial is not None:
            self._ends.append(threading.Thread(target=self._trial.end, daemon=True))
            self._ends[-1].start()
            self._trial = None


def _trial(parameters: dict[str, Any], plan: Plan) -> tuple[Point, int]:
    drawn = plan.space.cut(parameters, plan.base), plan.base.seed
    return parameters.get("trial", drawn)


def first_name(parameters: dict[str, Any], plan: Plan) -> str:
    """Name of the record that a trial begins with."""
    if member := parameters.get("member"):
        point = plan.space.cut(member["point"], plan.base)
        return trial_name(point, plan.base.seed, member["fork"])
    return trial_name(*_trial(parameters, plan))


def run_member(parameters: dict[str, Any], plan: Plan) -> None:
    """Tune's trainable for population-based training: a chain of runs.

    A member that takes over another's state gets that one's checkpoint from Tune, a file with the
    URL of the run's own checkpoint, and goes on from there as a fork with other values. The run may
    train on before that: it keeps the checkpoint of every step that it was asked to end at.
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
        if fork is None:
            raise ValueError(
                f"{state['run']} has no checkpoint of step {done} to take over any more"
            )
    trial = Trial(plan, point, plan.base.seed, fork, name)
    for i, step in enumerate(plan.stops):
        if step <= done:
            continue
        metrics = trial.train_to(step, [step])
        if trial.record.status == FAILED:
            # Tune leaves NaN out of a population; the worst takes over the state of the best.
            metrics = {plan.objective: -math.inf if plan.mode == "max" else math.inf}
        with tempfile.TemporaryDirectory() as folder:
            # Null where a continued sweep's member has trained on since, and keeps it no more.
            fork = "" if trial.record.status == FAILED else trial.checkpoint(step) or None
            state = {"fork": fork, "step": step, "run": trial.record.run}
            Path(folder, FORK).write_text(json.dumps(state))
            metrics |= {"name": trial.record.name, "budget": i + 1}
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
        if trial.record.status == FAILED:
            return
