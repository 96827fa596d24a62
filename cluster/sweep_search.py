"""A sweep's search with Ray Tune, on one seed: which points of the space are the best.

Random, a grid, Optuna's TPE, each with ASHA's early stopping, or population-based training. ASHA
judges a trial by those before it; those that all trials together show to be among the best go on
after all.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from optuna.logging import WARNING
from optuna.logging import set_verbosity as set_optuna_verbosity
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from cluster.storage import open_storage, pyarrow_filesystem
from cluster.sweep_config import SearchConfig, first_points
from cluster.sweep_progress import Progress
from cluster.sweep_records import FAILED, OWN, REPLACED, STOPPED, Record, read_records
from cluster.sweep_results import least_first
from cluster.sweep_space import Point, value_of
from cluster.sweep_trainables import TrialTrainable, run_member
from cluster.sweep_trial import Plan

# Tune's own bookkeeping, which a continued sweep does not read.
FOLDER = "tune"
# A trial's driver needs memory and no core: cores are the workers'.
DRIVER = {"memory": 256 * 2**20}
TUNE_RETRIES = 2  # of a trial whose driver was lost


def search_space(plan: Plan, search: SearchConfig, concurrent: int) -> None:
    """Try points on the sweep's own seed; what comes of it is in the records."""
    if search.algorithm == "pbt":
        _train_population(plan, search)
        return
    options: dict[str, Any] = {}
    if len(plan.stops) > 1:
        options["scheduler"] = _EarlyStopping(search.reduction, len(plan.stops))
    if search.algorithm == "tpe":
        _train_drawn(plan, search, concurrent, options)
    else:
        trials = [(point, plan.base.seed) for point in first_points(plan, search)]
        progress = Progress(plan, search.algorithm, len(trials), concurrent)
        train_trials(trials, plan, progress, **options)
    _train_promoted(plan, concurrent)


def _train_promoted(plan: Plan, concurrent: int) -> None:
    """Train on the best of each stop that were stopped there.

    A trial that comes early is compared with few others, and in a grid with its neighbours. With
    this the best go on whatever the order in which trials came.
    """
    for stop, following in pairwise(plan.stops):
        compared = [record for record in _trials_of(plan) if record.point]  # all but its own
        trials = [
            (record.point, record.seed)
            for record in best_at(stop, compared, plan)
            if record.status == STOPPED and max(map(int, record.measured)) < following
        ]
        if trials:
            further = replace(plan, stops=[following])
            progress = Progress(further, f"on to step {following}", len(trials), concurrent)
            train_trials(trials, further, progress)


def best_at(stop: int, records: list[Record], plan: Plan) -> list[Record]:
    """Those that may go on of all that were measured at a stop: one in `reduction`, at least one
    (successive halving, Jamieson and Talwalkar, 2016)."""
    measured = [record for record in records if str(stop) in record.measured]
    measured.sort(key=lambda r: least_first(r.measured[str(stop)][plan.objective], plan.mode))
    return measured[: max(1, len(measured) // plan.reduction)]


class _EarlyStopping(AsyncHyperBandScheduler):
    """ASHA that lets no trial pass a rung for want of others there, as Ray's does: if those that
    come first are among the best, `_train_promoted` goes on with them. The sweep's own
    configuration is not compared: it is trained to the end in any case."""

    def __init__(self, reduction: int, stops: int) -> None:
        super().__init__(
            time_attr="budget",
            grace_period=1,
            max_t=reduction ** (stops - 1),
            reduction_factor=reduction,
        )
        self._reduction = reduction
        self._measured = defaultdict[int, set[str]](set)  # trials by budget

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["name"].startswith(OWN):
            return self.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        self._count(trial, result)
        return decision if len(self._measured[result["budget"]]) >= self._reduction else self.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Of a trial that ends by itself, as those of a continued sweep do that were stopped."""
        if not result["name"].startswith(OWN):
            super().on_trial_complete(tune_controller, trial, result)
            self._count(trial, result)

    def _count(self, trial: Any, result: dict[str, Any]) -> None:
        if not math.isnan(result[self.metric]):
            self._measured[result["budget"]].add(trial.trial_id)


def train_trials(
    trials: list[tuple[Point, int]], plan: Plan, progress: Progress, **options: Any
) -> None:
    """Train (point, seed) by (point, seed)."""
    options["search_alg"] = BasicVariantGenerator(max_concurrent=progress.concurrent)
    _fit(TrialTrainable, plan, progress, {"trial": tune.grid_search(trials)}, options)


def _train_drawn(
    plan: Plan, search: SearchConfig, concurrent: int, options: dict[str, Any]
) -> None:
    """Optuna's TPE draws points; those of a sweep that is continued come first."""
    known = [plan.space.whole(record.point, plan.base) for record in _trials_of(plan)]
    options |= {
        "num_samples": search.trials,
        "max_concurrent_trials": concurrent,
        "search_alg": OptunaSearch(
            seed=plan.base.seed,
            points_to_evaluate=[point for point in known if point is not None],
        ),
    }
    progress = Progress(plan, search.algorithm, search.trials, concurrent)
    _fit(TrialTrainable, plan, progress, plan.space.domains(), options)


def _train_population(plan: Plan, search: SearchConfig) -> None:
    own = {key.name: value_of(plan.base, key.name) for key in plan.space.keys}
    members = {
        f"member-{i}": {"name": f"member-{i}", "point": own | point, "fork": ""}
        for i, point in enumerate(first_points(plan, search))
    }
    for record in _trials_of(plan):  # the newest of each member comes last
        if record.member in members and record.status not in (REPLACED, FAILED):
            members[record.member] |= {"point": own | record.point, "fork": record.fork}
    options = {
        "scheduler": PopulationBasedTraining(
            time_attr="budget",
            perturbation_interval=1,
            synch=True,  # else who is measured last has trained longest, and seems the best
            hyperparam_mutations={"member": {"point": plan.space.domains()}},
        ),
        # All at once, and their workers in turn: a member that waited for others to end would
        # have nobody to learn from.
        "search_alg": BasicVariantGenerator(max_concurrent=len(members)),
        "trial_name_creator": lambda trial: trial.config["member"]["name"],
    }
    progress = Progress(plan, search.algorithm, len(members), len(members))
    parameters = {"member": tune.grid_search(list(members.values()))}
    _fit(run_member, plan, progress, parameters, options)


def _trials_of(plan: Plan) -> list[Record]:
    records = read_records(open_storage(plan.url, plan.base.storage))
    return [record for record in records if record.is_trial and record.seed == plan.base.seed]


def _fit(
    trainable: Callable[..., None] | type[tune.Trainable],
    plan: Plan,
    progress: Progress,
    parameters: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Run Tune with a trainable that gets parameters and the plan."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # files that nobody reads
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end the search, not the sweep
    set_optuna_verbosity(WARNING)
    filesystem, path = pyarrow_filesystem(f"{plan.url}/{FOLDER}", plan.base.storage)
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trainable, plan=plan), tune.PlacementGroupFactory([DRIVER])
        ),
        param_space=parameters,
        tune_config=tune.TuneConfig(
            metric=plan.objective,
            mode=plan.mode,
            reuse_actors=True,  # a driver's imports take seconds
            **options,
        ),
        run_config=tune.RunConfig(
            name=str(time.time_ns()),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=TUNE_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[progress],
            verbose=0,
        ),
    ).fit()
