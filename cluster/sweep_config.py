"""Configuration of a sweep, and what of it can be known to be wrong before a trial starts."""

from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.config import TrainConfig, WorkerRange
from cluster.manifest import read_manifest
from cluster.storage import open_storage
from cluster.sweep_space import Point, Space, parse_space, with_values
from cluster.sweep_trial import Plan
from cluster.training import check_network, resolve
from sepico.schedule import contrast_start_step

MEASURES = ("miou", "confidence", "entropy", "information")
# What may change in mid-run: losses, not state.
PERTURBABLE = {"contrast.temperature", "contrast.weight", "contrast.regularizer_weight"}
CHECKED_POINTS = 200


@dataclass
class SearchConfig:
    """How the space is searched.

    Attributes:
        algorithm: "random", "grid" (of choices), "tpe" (Optuna), or "pbt": population-based
            training, which changes temperature and weights in mid-run.
        trials: Trials of the search on one seed, or members of a population; a grid takes all its
            points.
        early_stopping: Stop trials at each rung but the best of `reduction` (ASHA); not for "pbt".
        rungs: Times that a trial is measured between the contrast's start and the end; a population
            takes over and changes at each of them.
        reduction: A rung lies at 1 / reduction of the next one's distance from the start.
        seeds: Further seeds, which the best are repeated with.
        top: Configurations that are trained to the end on all seeds, besides the sweep's own.
        objective: Measure of the validation to search by: "student_miou", "teacher_miou", or
            without labels "teacher_information", "teacher_confidence" or "teacher_entropy" (least).
        concurrent: Trials at a time; 0 for as many as the cluster has room for.
        share_warm_up: Train what trials have in common before the contrast's start once.
    """

    algorithm: Literal["random", "grid", "tpe", "pbt"] = "random"
    trials: int = 16
    early_stopping: bool = True
    rungs: int = 3
    reduction: int = 3
    seeds: tuple[int, ...] = ()
    top: int = 3
    objective: str = "student_miou"
    concurrent: int = 0
    share_warm_up: bool = True

    def __post_init__(self) -> None:
        least = {"trials": 1, "rungs": 1, "reduction": 2, "top": 1, "concurrent": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"search.{name} is {getattr(self, name)}: at least {lowest}")
        if min(self.seeds, default=0) < 0:
            raise ValueError(f"search.seeds is {list(self.seeds)}: none must be negative")


@dataclass
class SweepConfig(TrainConfig):
    """A sweep; every key of a training run is the trials'.

    Attributes:
        run: Name (a folder below `runs`) or URL of the sweep. One that exists is continued, where
            it was started with the same configuration and space.
        space: YAML file of what to search; empty for the contrast (jobs/spaces/contrast.yaml).
        resume: Name or URL of a sweep to continue, in place of `run`, with its own configuration
            and space. Beside it may be given what trials do not differ by, such as workers.
        search: How the space is searched.
    """

    space: str = ""
    resume: str = ""
    search: SearchConfig = field(default_factory=SearchConfig)


def make_plan(base: TrainConfig, search: SearchConfig, text: str) -> Plan:
    """What all trials have in common. Raises ValueError, in one line, where one could not run."""
    elastic = isinstance(base.workers, WorkerRange) and base.workers.min != base.workers.max
    if base.fork or elastic:
        raise ValueError("a sweep takes no fork, and a fixed number of workers for each trial")
    base = resolve(replace(base, workers=base.worker_range.max))
    space = parse_space(text, base)
    for method in sorted(_methods(base, space)):
        _check_objective(replace(base, method=method), search.objective)
    beyond = {key.name for key in space.keys} - PERTURBABLE
    if beyond and search.algorithm == "pbt":
        raise ValueError(
            f"space: {', '.join(sorted(beyond))} cannot change in mid-run: population-based "
            f"training searches {', '.join(sorted(PERTURBABLE))}"
        )
    plan = Plan(
        url=base.run,
        base=base,
        space=space,
        objective=search.objective,
        stops=_stops(base, search),
        reduction=search.reduction,
        warm_up=_widest(base, space) if search.share_warm_up else None,
    )
    checked = []
    points = first_points(plan, search) or space.sample(CHECKED_POINTS, base.seed, base)
    for point in [{}, *points]:
        config = with_values(base, point)
        network = config.model, config.method, config.data.crop_height, config.data.crop_width
        if network not in checked:
            check_network(config)
            checked.append(network)
    return plan


def first_points(plan: Plan, search: SearchConfig) -> list[Point]:
    """Points known from the beginning; none where the search draws them as it goes."""
    if search.algorithm == "grid":
        return plan.space.grid(plan.base)
    if search.algorithm == "tpe":
        return []
    return plan.space.sample(search.trials, plan.base.seed, plan.base)


def _stops(base: TrainConfig, search: SearchConfig) -> list[int]:
    steps = base.optimization.steps
    start = min(contrast_start_step(base.contrast.start, base.optimization), steps - 1)
    if search.algorithm == "pbt":
        shares = [(i + 1) / search.rungs for i in range(search.rungs)]
    elif search.early_stopping:
        shares = [search.reduction ** (i + 1 - search.rungs) for i in range(search.rungs)]
    else:
        shares = [1.0]
    return sorted({start + max(1, round(share * (steps - start))) for share in shares})


def _widest(base: TrainConfig, space: Space) -> Point:
    """What a warm-up has to keep so that all trials can fork from it."""
    methods, lengths = _methods(base, space), [base.contrast.bank_length]
    for key in space.keys:
        lengths += key.extremes() if key.name == "contrast.bank_length" else []
    if "bankcl" in methods:
        return {"method": "bankcl", "contrast.bank_length": max(lengths)}
    return {"method": min(methods - {"source_only"} or methods)}


def _methods(base: TrainConfig, space: Space) -> set[str]:
    return {base.method}.union(*(key.arguments for key in space.keys if key.name == "method"))


def _check_objective(base: TrainConfig, objective: str) -> None:
    networks = ("student",) if base.method == "source_only" else ("student", "teacher")
    known = [f"{network}_{measure}" for network in networks for measure in MEASURES]
    if objective not in known:
        raise ValueError(
            f"search.objective {objective!r} is reported by no trial of method {base.method}: "
            f"give one of {', '.join(known)}"
        )
    if not base.validation.data:
        raise ValueError("validation.data is not set: a sweep measures its trials on it")
    store = open_storage(base.validation.data, base.storage)
    if objective.endswith("miou") and not read_manifest(store).labelled:
        raise ValueError(
            f"search.objective {objective} needs labels, {store.url} has none: "
            f"search by {networks[-1]}_information"
        )
