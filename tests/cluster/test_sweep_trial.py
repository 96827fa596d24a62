"""A trial's run and its record, without a cluster."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.exceptions import ActorDiedError

from cluster import sweep_trainables, sweep_trial
from cluster.checkpoint_format import MANIFEST, Checkpoint
from cluster.config import TrainConfig
from cluster.storage import Storage, StorageConfig, open_storage
from cluster.sweep_progress import Progress
from cluster.sweep_records import FAILED, read_record, read_records
from cluster.sweep_space import parse_space
from cluster.sweep_trial import Plan, Trial

POINT = {"contrast.temperature": 3.0}
SPACE = "contrast.temperature: {uniform: [1.0, 4.0]}"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    base, url = TrainConfig(), open_storage(str(tmp_path / "sweep"), StorageConfig()).url
    space = parse_space(SPACE, base)
    return Plan(url, base, space, "student_miou", stops=[3, 5], reduction=2, warm_up=None)


def leave_checkpoint(run: Storage, step: int) -> str:
    checkpoint = Checkpoint(step, 1, 1, 1, {}, {})
    run.put(f"{checkpoint.prefix}/student-00000.safetensors", b"")
    run.put(f"{checkpoint.prefix}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())
    return f"{run.url}/{checkpoint.prefix}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError("key"), "KeyError('key')"),
    ],
)
def test_a_trial_that_fails_in_any_way_is_recorded_with_its_reason(
    error, reason, plan, monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sweep_trial, "PausingTraining", fail)
    Trial(plan, POINT, 76).train_to(3, plan.stops)
    (record,) = read_records(open_storage(plan.url, StorageConfig()))
    assert (record.status, record.reason) == (FAILED, reason)


def test_a_trial_whose_cluster_lost_a_part_is_left_to_tune_to_begin_again(plan, monkeypatch):
    def lose(*_: object) -> None:
        raise ActorDiedError

    monkeypatch.setattr(sweep_trial, "PausingTraining", lose)
    with pytest.raises(ActorDiedError):
        Trial(plan, POINT, 76).train_to(3, plan.stops)


@pytest.mark.parametrize(
    "parameters",
    [{"trial": (POINT, 76)}, POINT, {"member": {"name": "member-0", "point": POINT, "fork": ""}}],
)
def test_a_trial_whose_driver_is_lost_before_it_measured_is_recorded_as_failed(parameters, plan):
    progress, store = Progress(plan, "grid", 1, 1), open_storage(plan.url, StorageConfig())
    lost = SimpleNamespace(trial_id="1", config=parameters, error_file="")
    progress.on_trial_error(0, [lost], lost)  # it has no record yet
    assert not read_records(store)
    record = Trial(plan, POINT, 76).record
    record.write(store)
    progress.on_trial_error(0, [lost], lost)
    found = read_record(store, record.name)
    assert (found.status, found.reason) == (FAILED, "its driver was lost")


def test_a_trial_looks_past_a_damaged_checkpoint(plan):
    trial = Trial(plan, POINT, 76)
    run = open_storage(trial.record.run, StorageConfig())
    leave_checkpoint(run, 3)
    run.put(f"{leave_checkpoint(run, 5).removeprefix(run.url + '/')}/{MANIFEST}", b"{")
    run.put("metrics.jsonl", json.dumps({"step": 2, "student_miou": 40.0}).encode())
    assert trial.train_to(3, plan.stops) == {"student_miou": 40.0}


def test_a_trial_of_a_moved_sweep_goes_on_in_its_new_place(plan, tmp_path, monkeypatch):
    old = Trial(plan, POINT, 76)
    old.record.write(open_storage(plan.url, StorageConfig()))
    run = open_storage(old.record.run, StorageConfig())
    run.put("config.json", b'{"fork": "file:///old/prefix"}')
    leave_checkpoint(run, 3)
    moved = replace(plan, url=open_storage(str(tmp_path / "moved"), StorageConfig()).url)
    (tmp_path / "sweep").rename(tmp_path / "moved")
    begun = []
    monkeypatch.setattr(sweep_trial, "PausingTraining", lambda config, _: begun.append(config))
    trial = Trial(moved, POINT, 76)
    trial.train_to(5, plan.stops)
    assert trial.record.run.startswith(f"{moved.url}/trials/")
    # Else the run would be refused: it was started with another fork.
    assert [(config.run, config.fork) for config in begun] == [
        (trial.record.run, "file:///old/prefix")
    ]


def test_a_member_leaves_the_checkpoint_of_the_step_that_it_is_asked_for(plan):
    trial = Trial(plan, POINT, 76)
    run = open_storage(trial.record.run, StorageConfig())
    third, _ = leave_checkpoint(run, 3), leave_checkpoint(run, 5)
    assert trial.checkpoint(3) == third
    assert trial.checkpoint(4) == ""


def test_a_checkpoint_that_is_kept_no_more_is_not_taken_over(plan, tmp_path, monkeypatch):
    (tmp_path / sweep_trainables.FORK).write_text('{"fork": null, "step": 3, "run": "RUN"}')
    session = SimpleNamespace(
        get_context=lambda: SimpleNamespace(get_trial_name=lambda: "member-0"),
        get_checkpoint=lambda: tune.Checkpoint.from_directory(str(tmp_path)),
    )
    monkeypatch.setattr(sweep_trainables, "tune", session)
    with pytest.raises(ValueError, match="RUN has no checkpoint of step 3"):
        sweep_trainables.run_member({"member": {"point": POINT, "fork": ""}}, plan)
