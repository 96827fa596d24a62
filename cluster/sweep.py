"""A sweep from its configuration to its results: which temperature, which weights.

A sweep is a folder of runs and records (`cluster.sweep_trial`), and these are all it needs to be
continued: Tune starts anew, and every trial that is asked for again answers from its run.

First a search on one seed (`cluster.sweep_search`). Then the best, and the configuration that the
sweep began with, are trained to the end on every seed, and ranked by the mean.
"""

import json
from dataclasses import asdict, replace
from typing import Any

from cluster.config import TrainConfig, WorkerRange
from cluster.events import log_event
from cluster.lease import hold_lease
from cluster.run_config import CHANGEABLE, contradictions, differences
from cluster.storage import Storage, StorageError, open_storage
from cluster.sweep_config import SearchConfig, SweepConfig, make_plan
from cluster.sweep_progress import Progress
from cluster.sweep_records import read_records
from cluster.sweep_results import Ranking, candidates, rank
from cluster.sweep_search import search_space, train_trials
from cluster.sweep_space import Point, parse_space, value_of, with_values
from cluster.sweep_trial import Plan
from cluster.urls import absolute_url, run_url
from cluster.workers import connect_ray, place, room

SWEEP = "sweep.json"
# What may change of a sweep that is continued. Trials are compared by one validation.
CONTINUABLE = CHANGEABLE - {"validation"} | {"search.concurrent"}
URLS = ("data.source", "data.target", "validation.data")


def check(config: SweepConfig, space: str) -> None:
    """Raise ValueError, in one line, for what is known to be wrong without a cluster."""
    _planned(config, space)


def sweep(config: SweepConfig, space: str) -> Ranking:
    """Run or continue a sweep; `space` is the space file's text, empty for that of `resume`.

    Raises ValueError (one line: what is wrong and the fix) before a trial starts.
    """
    plan, search, space = _planned(config, space)
    base = plan.base
    store = open_storage(plan.url, base.storage)
    store.check()
    connect_ray()
    placed, concurrent = _place(plan, search)
    wanted = _described(plan, search, space)
    with hold_lease(store):
        if config.run:  # once more: another may have begun the sweep since
            _check_same(store, wanted, base)
        store.put(SWEEP, json.dumps(wanted, indent=1).encode())
        search_space(placed, search, concurrent)
        best = candidates(read_records(store), plan)[: search.top]
        seeds = list(dict.fromkeys([base.seed, *search.seeds]))
        trials = [(point, seed) for seed in seeds for point in [{}, *best]]
        last = replace(placed, stops=plan.stops[-1:])
        progress = Progress(last, "to the end", len(trials), concurrent)
        train_trials(trials, last, progress)
        return rank(read_records(store), plan, seeds)


def _planned(config: SweepConfig, space: str) -> tuple[Plan, SearchConfig, str]:
    """Plan, search and space, checked against the sweep that `run` continues, if there is one."""
    base, search, space = _settings(config, space)
    plan = make_plan(base, search, space)
    store = open_storage(plan.url, base.storage)
    if config.run:
        _check_same(store, _described(plan, search, space), base)
    return plan, search, space


def _described(plan: Plan, search: SearchConfig, space: str) -> dict[str, Any]:
    described = {"config": asdict(plan.base), "search": asdict(search), "space": space}
    return json.loads(json.dumps(described))


def _check_same(store: Storage, wanted: dict[str, Any], base: TrainConfig) -> None:
    """Refuse to continue a sweep with what contradicts its own."""
    if not store.exists(SWEEP):
        return
    stored = json.loads(store.get(SWEEP))
    found = contradictions(_values(stored), _values(wanted), CONTINUABLE)
    for key, (old, new) in found.items():
        raise ValueError(
            f"sweep {store.url} was started with {key} = {old!r}, now it is {new!r}: keep the "
            "value, continue the sweep as it is by --resume, or give another --run"
        )
    _check_space(store.url, stored["space"], wanted["space"], base)


def _values(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored sweep's values by the keys of a SweepConfig."""
    return stored["config"] | {"search": stored["search"]}


def _check_space(url: str, old: str, new: str, base: TrainConfig) -> None:
    if parse_space(new, base) != parse_space(old, base):
        raise ValueError(
            f"sweep {url} was started with another space: continue it by --resume and without "
            "--space to go on with its own, or give a new sweep another --run"
        )


def _settings(config: SweepConfig, space: str) -> tuple[TrainConfig, SearchConfig, str]:
    """The trials' configuration, the search and the space: given, or those of a sweep to resume."""
    if bool(config.resume) == bool(config.run):
        raise ValueError("give the sweep a name, --run NAME, or continue one by --resume SWEEP")
    url = run_url(config.resume or config.run, config.runs)
    store = open_storage(url, config.storage)
    if not config.resume:
        return _trials(config, url), config.search, space
    if not store.exists(SWEEP):
        raise StorageError(f"no sweep at {store.url}: start one by --run")
    stored = json.loads(store.get(SWEEP))
    own = with_values(SweepConfig(), _flat(_values(stored)))
    config = _with_given(own, config)
    base = _trials(config, url)
    if space:
        _check_space(store.url, stored["space"], space, base)
    return base, config.search, stored["space"]


def _trials(config: SweepConfig, url: str) -> TrainConfig:
    given = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    return TrainConfig(**given | {"run": url})


def _with_given(own: SweepConfig, config: SweepConfig) -> SweepConfig:
    """A sweep's configuration with what is given beside `resume`, which is what differs from the
    default. Raises ValueError for a key that trials would be different by."""
    given = differences(asdict(SweepConfig()), asdict(config), {"resume", "space"})
    for key in given:
        old, new = value_of(own, key), value_of(config, key)
        if key in URLS:
            new = new and absolute_url(new)
        free = CONTINUABLE & {key, key.partition(".")[0]}
        if not free and contradictions({key: old}, {key: new}, set()):
            raise ValueError(
                f"the sweep was started with {key} = {old!r}, now it is {new!r}: leave it out "
                "beside --resume, or give a new sweep another --run"
            )
    return with_values(own, {key: value_of(config, key) for key in given})


def _flat(values: dict[str, Any], prefix: str = "") -> Point:
    """Nested values by dotted key."""
    flat: Point = {}
    for key, value in values.items():
        inside = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return flat


def _place(plan: Plan, search: SearchConfig) -> tuple[Plan, int]:
    """With a worker's cores filled in, and how many trials run at a time."""
    workers, cpus = plan.base.worker_range.max, plan.base.cpus_per_worker
    place(WorkerRange(workers, workers), cpus, plan.base.placement_timeout)
    most = room(cpus or 1) // workers
    concurrent = min(search.concurrent or most, most)
    if search.concurrent > most:
        message = (
            f"the cluster has room for {most} trials, not for the {search.concurrent} asked for"
        )
        log_event("warning", "concurrent", {"message": message})
    at_a_time = workers * concurrent
    cpus = place(WorkerRange(at_a_time, at_a_time), cpus)
    return replace(plan, base=replace(plan.base, cpus_per_worker=cpus)), concurrent
