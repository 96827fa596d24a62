"""How a sweep searches, stops, fails and goes on: Tune is real, and a run is what `train` leaves.

Training is replaced by `leave_a_run`, which writes at once what a run writes, so that many trials
cost seconds. `test_sweep.py` has the real one.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.util import placement_group_table

from cluster import pausing, sweep_search, sweep_trainables
from cluster import sweep as sweep_module
from cluster.checkpoint_format import MANIFEST, Checkpoint, list_checkpoints
from cluster.config import TrainConfig
from cluster.run_config import find_checkpoint
from cluster.storage import open_storage
from cluster.sweep import check, sweep
from cluster.sweep_config import SearchConfig, SweepConfig
from cluster.sweep_files import best_preset
from cluster.sweep_records import read_records
from cluster.sweep_trial import Plan, Trial
from cluster.training import Pauses
from jobs.command_line import parse
from tests.jobs.training import TINY, command

SPACE = """
contrast.temperature: {loguniform: [0.05, 300]}
contrast.weight: {uniform: [0.0, 2.0]}
"""
BEST = 3.0  # temperature
DIVERGING = 1.7  # weight above which a trial fails
CHANGES = {
    "workers": "1",
    "optimization.iterations": "20",
    "search.trials": "6",
    "search.rungs": "2",
    "search.reduction": "2",
    "search.seeds": "[77]",
    "search.top": "1",
}
POPULATION = {
    "search.algorithm": "pbt",
    "search.trials": "4",
    "search.rungs": "4",
    "search.seeds": "[]",
}


def leave_a_run(config: TrainConfig, until: int) -> None:
    """Leave the checkpoint and the metrics of a run that was trained to a step."""
    run = open_storage(config.run, config.storage)
    begun = [checkpoint.step for checkpoint in list_checkpoints(run)]
    start = begun[-1] if begun else find_checkpoint(config)[1].step if config.fork else 0
    if config.contrast.weight > DIVERGING:
        raise ValueError("step 3 is not finite")
    lines = run.get("metrics.jsonl").decode().splitlines() if begun else []
    miou = 50 - abs(math.log(config.contrast.temperature / BEST)) + until + config.seed / 100
    measured = {"miou": miou, "confidence": 90.0, "entropy": 20.0, "information": miou}
    measured = {f"student_{name}": value for name, value in measured.items()}
    lines.append(json.dumps({"step": until - 1, "trained": until - start, **measured}))
    run.put("metrics.jsonl", "\n".join(lines).encode())
    run.put("config.json", json.dumps(asdict(config)).encode())
    checkpoint = Checkpoint(until, 1, 1, 1, {}, {})
    run.put(f"{checkpoint.prefix}/student-00000.safetensors", b"")
    run.put(f"{checkpoint.prefix}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())


def leave_runs(config: TrainConfig, until: int, pauses: Pauses | None = None) -> None:
    """`train`, with its pauses."""
    for step in [*(pauses.steps if pauses else ()), until]:
        done = list_checkpoints(open_storage(config.run, config.storage))
        if not done or done[-1].step < step:
            leave_a_run(config, step)
        if step != until:
            pauses.progress.arrive.remote(step)
            if not ray.get(pauses.progress.wait_for_verdict.remote(step)):
                return


class TrialTrainable(sweep_trainables.TrialTrainable):
    def setup(self, config: dict, plan: Plan) -> None:
        pausing.train = leave_runs
        super().setup(config, plan)


def run_member(parameters: dict, plan: Plan) -> None:
    pausing.train = leave_runs
    sweep_trainables.run_member(parameters, plan)


@pytest.fixture(scope="module")
def fast(ray_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_search, "TrialTrainable", TrialTrainable)
        patch.setattr(sweep_search, "run_member", run_member)
        yield


def configure(data: dict[str, str], folder: Path, **changed: str) -> SweepConfig:
    flags = {**TINY, **data, **CHANGES, "run": str(folder / "sweep"), **changed}
    return parse(SweepConfig, command("", flags)[3:])


def trained_steps(folder: Path) -> Counter:
    """Steps trained by every run below a sweep."""
    steps: Counter = Counter()
    for path in (folder / "sweep").rglob("metrics.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        steps[str(path.parent.relative_to(folder / "sweep"))] = sum(of["trained"] for of in lines)
    return steps


# Of these workers five are of use.
ELASTIC = '{"min": 5, "max": 7}'
# Its cores are whatever there are, its workers a range of one number, a seed is repeated.
UNUSUAL = {
    "cpus_per_worker": "0",
    "workers": '{"min": 1, "max": 1}',
    "search.seeds": "[77, 76, 77]",
}


@pytest.fixture(scope="module")
def swept(fast, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    ranking = sweep(configure(data, folder, **UNUSUAL), SPACE)
    return ranking, folder


def test_the_worse_are_stopped_and_the_best_are_ranked_by_the_mean_over_seeds(swept):
    ranking, _ = swept
    status = Counter(r.status for r in ranking.records if r.is_trial and r.point and r.seed == 76)
    assert status["finished"] and status["stopped"] and sum(status.values()) == 6
    best = ranking.best
    assert best.complete and set(best.records) == {76, 77}
    assert best.mean == pytest.approx(best.records[76].last("student_miou") + 0.005)
    assert best.spread == pytest.approx(0.01 / math.sqrt(2))
    tried = [r for r in ranking.records if r.is_trial and r.measured]
    nearest = min(
        tried, key=lambda r: abs(math.log(r.point.get("contrast.temperature", 0.5) / BEST))
    )
    assert best.point == nearest.point
    assert ranking.default.complete, "the sweep's own configuration is not there to compare with"


def test_a_seed_that_is_given_twice_counts_once(swept):
    assert swept[0].seeds == [76, 77]


def test_the_best_preset_has_the_cores_that_were_asked_for(swept):
    """Not those that a trial had beside its neighbours."""
    assert yaml.safe_load(best_preset(swept[0]))["cpus_per_worker"] == 0


def test_a_trial_that_fails_is_recorded_with_its_reason_and_ends_nothing_else(swept):
    ranking, _ = swept
    failed = [record for record in ranking.records if record.status == "failed"]
    assert {record.reason for record in failed} == {"step 3 is not finite"}
    assert all(record.point["contrast.weight"] > DIVERGING for record in failed)


def test_the_steps_before_the_contrast_are_trained_once_a_seed(swept):
    ranking, folder = swept
    steps = trained_steps(folder)
    assert sum(steps[name] for name in steps if name.startswith("prefix")) == 2 * 2
    for record in ranking.records:
        if record.is_trial and record.measured:
            assert steps[f"trials/{record.name}"] == max(map(int, record.measured)) - 2


def test_nothing_of_the_cluster_is_held_when_a_sweep_is_over(swept):
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    states = {group["state"] for group in placement_group_table().values()}
    assert states <= {"REMOVED"}


def test_a_continued_sweep_trains_only_what_is_missing(swept, data, monkeypatch):
    ranking, folder = swept
    before, events = trained_steps(folder), []
    store = open_storage(str(folder / "sweep"), ranking.plan.base.storage)
    lost = ranking.best.records[77]
    for key in [f"records/{lost.name}.json", *store.list(f"trials/{lost.name}")]:
        store.delete(key)
    monkeypatch.setattr(sweep_module, "log_event", lambda *event: events.append(event))
    changed = {**UNUSUAL, "max_failures": "1", "search.concurrent": "9"}
    again = sweep(configure(data, folder, **changed), SPACE)
    assert again.best == replace(
        ranking.best, records={**ranking.best.records, 77: again.best.records[77]}
    )
    assert trained_steps(folder) == before
    ((_, _, cut),) = events
    assert "room for 2 trials, not for the 9 " in cut["message"]


def test_a_sweep_is_continued_as_it_began_or_as_it_is(swept, data):
    begun = configure(data, swept[1], **UNUSUAL)
    check(begun, SPACE)
    without = {name: value for name, value in UNUSUAL.items() if name != "search.seeds"}
    with pytest.raises(ValueError, match=r"search\.seeds = .*77.*now it is \[77\].*--resume"):
        check(configure(data, swept[1], **without), SPACE)
    resumed = SweepConfig(resume=begun.run)
    check(resumed, "")
    for config in (begun, resumed):
        with pytest.raises(ValueError, match="another space"):
            check(config, SPACE.replace("300", "200"))


def test_a_sweep_that_another_began_meanwhile_is_not_overwritten(
    swept, data, tmp_path, monkeypatch
):
    config = configure(data, tmp_path, **UNUSUAL)
    theirs = (swept[1] / "sweep/sweep.json").read_text().replace('"weight": 1', '"weight": 2')

    def wait(plan: Plan, _: SearchConfig) -> tuple[Plan, int]:
        (tmp_path / "sweep").mkdir()
        (tmp_path / "sweep/sweep.json").write_text(theirs)
        return plan, 1

    monkeypatch.setattr(sweep_module, "_place", wait)
    with pytest.raises(ValueError, match=r"contrast\.weight = 2"):
        sweep(config, SPACE)
    assert (tmp_path / "sweep/sweep.json").read_text() == theirs


def test_the_best_of_a_rung_go_on_whenever_they_come(fast, data, tmp_path):
    """First the worst, which no other is there to beat; then one of the best, that ASHA stops since
    it is one of two."""
    changed = {
        "search.algorithm": "grid",
        "search.reduction": "3",
        "search.seeds": "[]",
        "search.concurrent": "1",
    }
    space = "contrast.temperature: {choice: [120.0, 2.9, 2.8, 110.0, 0.5, 100.0, 90.0]}"
    ranking = sweep(configure(data, tmp_path, **changed), space)
    both = {str(stop) for stop in ranking.plan.stops}
    trials = [record for record in ranking.records if record.is_trial]
    measured = {r.point.get("contrast.temperature"): r.measured.keys() for r in trials}
    assert measured[2.9] == measured[2.8] == both
    assert measured[None] == both, "the sweep's own configuration was stopped"
    assert all(len(measured[worse]) == 1 for worse in (120.0, 110.0, 100.0, 90.0))


def test_a_trial_of_a_continued_sweep_is_compared_with_those_that_were_stopped():
    """Who was stopped answers and is done; the best, asked last, must not be stopped as the first
    of its rung."""
    scheduler = sweep_search._EarlyStopping(reduction=3, stops=3)
    assert scheduler.set_search_properties("student_miou", "max")
    for i, miou in enumerate((1.0, 2.0, math.nan, 3.0, 10.0)):
        trial = SimpleNamespace(trial_id=str(i))
        scheduler.on_trial_add(None, trial)
        result = {"name": f"trial-{i}", "budget": 1, "student_miou": miou}
        if miou < 10.0 or math.isnan(miou):
            scheduler.on_trial_complete(None, trial, result)
    assert scheduler.on_trial_result(None, trial, result) == scheduler.CONTINUE


def test_a_trials_checkpoint_is_of_the_step_asked_for_however_far_it_has_come(swept):
    plan, best = swept[0].plan, swept[0].best
    trial = Trial(plan, best.point, plan.base.seed)
    steps = [
        find_checkpoint(replace(plan.base, fork=trial.checkpoint(s)))[1].step for s in plan.stops
    ]
    assert steps == plan.stops


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["tpe", "grid"])
def test_every_algorithm_finds_points_of_the_space(algorithm, fast, data, tmp_path):
    space = SPACE
    if algorithm == "grid":
        space = "contrast.temperature: {choice: [0.1, 3.0, 100.0]}"
    config = configure(
        data,
        tmp_path,
        **{"search.algorithm": algorithm, "search.trials": "4", "search.seeds": "[]"},
    )
    ranking = sweep(config, space)
    tried = [r.point for r in ranking.records if r.is_trial and r.point]
    assert len(tried) == (3 if algorithm == "grid" else 4)
    assert all(0.05 <= point["contrast.temperature"] <= 300 for point in tried)
    if algorithm == "grid":
        assert ranking.best.point == {"contrast.temperature": 3.0}


@pytest.mark.slow
def test_a_population_takes_over_the_state_of_the_better_and_changes_in_mid_run(
    fast, data, tmp_path
):
    ranking = sweep(configure(data, tmp_path, **POPULATION), SPACE)
    members = [record for record in ranking.records if record.member]
    assert {record.member for record in members} == {f"member-{i}" for i in range(4)}
    forked = [record for record in members if record.fork]
    assert forked, "no member took over another's state"
    for record in forked:
        parent = next(r for r in members if record.fork.startswith(f"{r.run}/"))
        assert parent.point != record.point
    failed = {record.member for record in members if record.status == "failed"}
    assert failed, "no member diverged"
    assert failed <= {record.member for record in forked}
    store = open_storage(ranking.plan.url, ranking.plan.base.storage)
    assert len(read_records(store)) == len(ranking.records)


@pytest.mark.slow
def test_members_are_compared_after_equally_many_steps(fast, data, tmp_path, monkeypatch):
    # One driver at a time: the members train in turn. Compared as they report, the first, who is
    # the worst, would already be a rung ahead when all the others have reported, and seem the best.
    monkeypatch.setattr(sweep_search, "DRIVER", {"CPU": ray.cluster_resources()["CPU"]})
    space = "contrast.temperature: {choice: [30.0, 300.0]}"
    config = configure(data, tmp_path, **POPULATION | {"search.trials": "2"})
    ranking = sweep(config, space)
    members = [record for record in ranking.records if record.member and not record.fork]
    assert [record.point["contrast.temperature"] for record in members] == [300.0, 30.0]
    assert members[0].status == "replaced"


@pytest.mark.slow
def test_the_run_of_a_member_that_took_over_another_is_noted_as_replaced(fast, data, tmp_path):
    space = SPACE.replace("2.0", str(DIVERGING))
    ranking = sweep(configure(data, tmp_path, **POPULATION), space)
    assert any(record.status == "replaced" for record in ranking.records if record.member)


@pytest.mark.parametrize(
    ("changed", "space", "words"),
    [
        ({"search.objective": "student_iou"}, SPACE, ["'student_iou'", "no trial", "student_miou"]),
        (
            {"search.objective": "teacher_miou"},
            "method: {choice: [source_only, distcl]}",
            ["'teacher_miou'", "no trial of method source_only"],
        ),
        ({"validation.data": ""}, SPACE, ["validation.data is not set"]),
        ({"workers": "4", "cpus_per_worker": "1"}, SPACE, ["workers: 4", "2 CPU", "--workers"]),
        ({"search.algorithm": "pbt"}, "method: {choice: [protocl]}", ["method", "mid-run"]),
        (
            {"optimization.global_batch": "8", "workers": ELASTIC},
            SPACE,
            ["a fixed number of workers"],
        ),
        ({"search.algorithm": "grid"}, SPACE, ["contrast.temperature is loguniform", "choice"]),
        ({}, "contrast.temperature: {uniform: [0, 1]}", ["contrast.temperature can be 0"]),
        ({}, "contrast.temprature: {uniform: [1, 2]}", ["temprature", "did you mean"]),
        ({}, "model.encoder: {choice: [tu-test_efficientnet, resnet9000]}", ["'resnet9000'"]),
    ],
)
def test_what_cannot_work_is_refused_before_a_trial_starts(
    changed, space, words, fast, data, tmp_path
):
    with pytest.raises(ValueError) as error:
        sweep(configure(data, tmp_path, **changed), space)
    assert all(word in str(error.value) for word in words), error.value
    assert not list(tmp_path.iterdir())


def test_miou_is_no_objective_without_labels(fast, data, tmp_path):
    unlabelled = {"validation.data": data["data.target"]}
    with pytest.raises(ValueError, match=r"needs labels.*teacher_information"):
        sweep(configure(data, tmp_path, **unlabelled), SPACE)
