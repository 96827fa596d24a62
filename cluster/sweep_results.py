"""What a sweep found: a ranking by the mean over seeds, and what else its records say."""

import csv
import io
import math
import statistics
from dataclasses import dataclass

import numpy as np
import optuna

from cluster.errors import WorkError
from cluster.sweep_progress import describe
from cluster.sweep_records import FAILED, FINISHED, Record
from cluster.sweep_space import Key, Point, value_of
from cluster.sweep_trial import Plan


@dataclass(frozen=True)
class Entry:
    """One configuration and its trials, by seed."""

    point: Point
    records: dict[int, Record]
    values: dict[int, float]  # objective at the last step, of each seed that got there
    complete: bool  # on all seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds, NaN of one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Ranking:
    """All trials of a sweep, best configuration first."""

    plan: Plan
    seeds: list[int]
    entries: list[Entry]
    records: list[Record]

    @property
    def best(self) -> Entry | None:
        """None if nothing was trained to the end."""
        return next((entry for entry in self.entries if entry.values), None)

    @property
    def default(self) -> Entry | None:
        """The configuration that the sweep began with."""
        return next((entry for entry in self.entries if not entry.point), None)

    def check(self) -> None:
        """Raise WorkError, in one line, unless the best was trained to the end on all seeds."""
        if self.best and self.best.complete:
            return
        found = f"no trial came to its end with a {self.plan.objective}"
        if self.best:
            missing = ", ".join(str(seed) for seed in self.seeds if seed not in self.best.values)
            found = f"the best, {describe(self.best.point)}, did not come to its end on {missing}"
        reasons = sorted({r.reason for r in self.records if r.is_trial and r.status == FAILED})
        raise WorkError(": ".join([f"sweep {self.plan.url}", found, *filter(None, reasons)]))


def candidates(records: list[Record], plan: Plan) -> list[Point]:
    """Points to train to the end, best first: by how far they came, then by the objective there.

    Of a population the members' last points.
    """
    tried = [
        record
        for record in records
        if record.is_trial
        and record.point
        and record.seed == plan.base.seed
        and not math.isnan(record.last(plan.objective))
    ]
    tried.sort(key=lambda record: _order(record, plan))
    points: list[Point] = []
    for record in tried:
        if record.point not in points:
            points.append(record.point)
    return points


def rank(records: list[Record], plan: Plan, seeds: list[int]) -> Ranking:
    """Rank by the number of seeds that were trained to the end, then by the mean over these."""
    trials = [record for record in records if record.is_trial and not record.member]
    by_point: dict[str, list[Record]] = {}
    for record in trials:
        by_point.setdefault(str(sorted(record.point.items())), []).append(record)
    entries = []
    for of_point in by_point.values():
        found = {record.seed: record for record in of_point}
        values = {
            record.seed: value
            for record in of_point
            if record.status == FINISHED and record.seed in seeds
            if not math.isnan(value := record.last(plan.objective))
        }
        entries.append(Entry(of_point[0].point, found, values, len(values) == len(seeds)))

    def order(entry: Entry) -> tuple:
        if entry.values:
            return (-len(entry.values), least_first(entry.mean, plan.mode))
        return (0, *min(_order(record, plan) for record in entry.records.values()))

    entries.sort(key=order)
    return Ranking(plan, seeds, entries, records)


def _order(record: Record, plan: Plan) -> tuple[float, float]:
    reached = max(map(int, record.measured), default=0)
    return -reached, least_first(record.last(plan.objective), plan.mode)


def least_first(value: float, mode: str) -> float:
    """A key that sorts the best value first, NaN last."""
    if math.isnan(value):
        return math.inf
    return value if mode == "min" else -value


def table(ranking: Ranking, rows: int = 20) -> str:
    """For the terminal: configurations, best first; mean and spread over seeds."""
    objective = ranking.plan.objective
    lines = [f"{'rank':>4} {objective:>24} {'step':>6}  {'status':<9} configuration"]
    for place, entry in enumerate(ranking.entries[:rows], 1):
        record = next(iter(entry.records.values()))
        value = f"{record.last(objective):.2f}"
        if entry.values:
            value = f"{entry.mean:.2f}"
            if len(entry.values) > 1:
                value += f" +- {entry.spread:.2f} ({len(entry.values)} seeds)"
        step = max(map(int, record.measured), default=0)
        shown = f"{place:>4} {value:>24} {step:>6}  {record.status:<9} {describe(entry.point)}"
        lines.append(shown)
        if record.reason and record.status == "failed":
            lines.append(f"{'':>47} {record.reason}")
    if len(ranking.entries) > rows:
        lines.append(f"... and {len(ranking.entries) - rows} more in trials.csv")
    return "\n".join(lines)


def trials_csv(ranking: Ranking) -> bytes:
    """One line a trial: configuration, seed, how it ended, what was measured at its last step."""
    keys = [key.name for key in ranking.plan.space.keys]
    trials = [record for record in ranking.records if record.is_trial]
    measured = [
        record.measured[max(record.measured, key=int)] for record in trials if record.measured
    ]
    metrics = sorted({name for metrics in measured for name in metrics})
    text = io.StringIO()
    known = ["name", "seed", *keys, "status", "step", *metrics, "worker_seconds", "fork", "reason"]
    writer = csv.DictWriter(text, known, lineterminator="\n")
    writer.writeheader()
    for record in trials:
        step = max(record.measured, key=int) if record.measured else ""
        own = {key: value_of(ranking.plan.base, key) for key in keys}
        writer.writerow(
            {
                "name": record.name,
                "seed": record.seed,
                **(own | record.point),
                "status": record.status,
                "step": step,
                **(record.measured[step] if step else {}),
                "worker_seconds": round(record.worker_seconds, 1),
                "fork": record.fork,
                "reason": record.reason,
            }
        )
    return text.getvalue().encode()


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: of ranks, ties at their mean; NaN where one of them is constant."""

    def ranks(values: list[float]) -> np.ndarray:
        ordered = np.sort(values)
        left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        return (left + right) / 2

    first, second = ranks(a), ranks(b)
    if len(a) < 2 or not first.std() or not second.std():
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def importances(ranking: Ranking) -> tuple[int, dict[str, float]]:
    """Each key's share in telling good trials from the rest, at the first stop, and that step.

    Of the search's trials, all at one step, so that none is ahead. Empty where nothing differs.
    """
    plan = ranking.plan
    step = plan.stops[0]
    trials = [r for r in ranking.records if r.is_trial and r.seed == plan.base.seed]
    points = [
        ({key.name: value_of(plan.base, key.name) for key in plan.space.keys} | record.point, value)
        for record in trials
        if not math.isnan(value := record.measured.get(str(step), {}).get(plan.objective, math.nan))
    ]
    varied = [k for k in plan.space.keys if len({str(point[k.name]) for point, _ in points}) > 1]
    if not varied or len({value for _, value in points}) < 2:
        return step, {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if ranking.plan.mode == "min" else "maximize")
    ranges = {
        key.name: _optuna_range(key, [point[key.name] for point, _ in points]) for key in varied
    }
    for point, value in points:
        params = {
            key.name: str(point[key.name]) if key.distribution == "choice" else point[key.name]
            for key in varied
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return step, optuna.importance.get_param_importances(study, evaluator=evaluator)


def _optuna_range(key: Key, values: list) -> optuna.distributions.BaseDistribution:
    if key.distribution == "choice":
        return optuna.distributions.CategoricalDistribution(sorted({str(v) for v in values}))
    log = "log" in key.distribution
    if "randint" in key.distribution:
        return optuna.distributions.IntDistribution(min(values), max(values), log=log)
    return optuna.distributions.FloatDistribution(min(values), max(values), log=log)


def warm_up_saving(ranking: Ranking) -> tuple[float, int, float]:
    """Worker-seconds of the warm-ups, trials that forked from them, worker-seconds they saved."""
    seconds = forks = saved = 0
    for record in ranking.records:
        if not record.is_trial:
            served = sum(trial.warm_up == record.name for trial in ranking.records)
            seconds, forks = seconds + record.worker_seconds, forks + served
            saved += record.worker_seconds * (served - 1)
    return seconds, forks, saved
