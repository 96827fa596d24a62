"""Training as a person runs it: `python -m jobs.train` on a real cluster, files and S3."""

import json
import os
import shutil
import signal
import subprocess
import time
from importlib.metadata import version

import pytest
import torch

from cluster import training
from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.lease import hold_lease
from cluster.storage import Storage, StorageConfig, open_storage
from cluster.workers import connect_ray
from jobs.command_line import parse
from tests.jobs.training import STEPS, command, final_weights, losses, metrics, run_job

pytestmark = pytest.mark.usefixtures("joined")


def test_a_run_leaves_config_metrics_events_checkpoints_and_panels(trained):
    run, _ = trained
    assert json.loads((run / "config.json").read_text())["model"]["num_classes"] == 5
    assert [line["step"] for line in metrics(run) if "source_ce" in line] == list(range(STEPS))
    assert [line["step"] for line in metrics(run) if "student_miou" in line] == [2, 5]
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "panels/step-00000003.png").read_bytes().startswith(b"\x89PNG")
    (saved,) = run.glob("checkpoints/step-00000006-*")
    manifest = json.loads((saved / "manifest.json").read_text())
    for part in ("student", "optimizer", "teacher"):
        for rank in range(2):
            assert f"{part}-{rank:05d}.safetensors" in manifest["files"]
    measured = ("miou", "confidence", "entropy", "information")
    assert manifest["metrics"].keys() == {
        f"{n}_{m}" for n in ("student", "teacher") for m in measured
    }
    assert manifest["config"] == json.loads((run / "config.json").read_text())
    assert manifest["versions"]["torch"] == version("torch")
    assert not list(run.rglob("*#*")), "an unfinished file"


def test_what_reading_cost_is_in_the_metrics(trained):
    run, _ = trained
    lines = [line for line in metrics(run) if "source_ce" in line]
    assert lines[0]["data_bytes_per_second"] > 0 and lines[0]["data_requests_per_second"] > 0
    for line in lines:
        assert line["data_retries"] == 0 and line["data_cache_hit_share"] == 0
        assert 0 <= line["data_wait_share"] <= 1 and 0 <= line["data_queue_depth"] <= 4


def test_contrast_starts_at_its_iteration(trained):
    steps = [line["step"] for line in metrics(trained[0]) if "source_contrast" in line]
    assert steps == list(range(2, STEPS))


def test_the_same_command_continues_and_a_finished_run_stays_as_it_is(trained):
    run, options = trained
    before = final_weights(run)
    job = run_job("jobs.train", options)
    assert job.returncode == 0, job.stderr
    after = final_weights(run)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_workers_that_begin_after_the_last_commit_return_its_metrics(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "first")
    options = {**trained[1], "runs": str(tmp_path), "workers": "1"}
    config = training.resolve(parse(TrainConfig, command("jobs.train", options)[3:]))
    run = open_storage(config.run, config.storage)
    connect_ray()
    with hold_lease(run) as lease:  # `train` would see that there is nothing to do
        found = training._train(config, lease, STEPS, None)
    assert found == list_checkpoints(run)[-1].metrics != {}


@pytest.mark.slow
def test_one_worker_and_two_workers_see_the_same_losses(trained, tmp_path):
    run, options = trained
    job = run_job("jobs.train", {**options, "workers": "1", "runs": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    pairs = zip(losses(metrics(tmp_path / "first")), losses(metrics(run)), strict=True)
    for one, two in pairs:
        assert one == pytest.approx(two, rel=2e-3)


@pytest.fixture(scope="module")
def killed(joined, trained, s3, folder, write_dataset) -> tuple[Storage, dict[str, str]]:
    """A bucket with the data and with what a run leaves whose driver was killed after the first
    of its checkpoints; the run's options."""
    bucket = s3.make_bucket("training")
    config = StorageConfig(endpoint=s3.endpoint)
    store = open_storage(bucket, config)
    write_dataset(folder, open_storage(f"{bucket}/labelled", config))
    write_dataset(folder, open_storage(f"{bucket}/unlabelled", config), labels=False)
    options = {
        **trained[1],
        "data.source": f"{bucket}/labelled",
        "data.target": f"{bucket}/unlabelled",
        "validation.data": f"{bucket}/labelled",
        "runs": f"{bucket}/killed",
        "storage.endpoint": s3.endpoint,
    }
    first, second = (  # 2: the driver's lease is generation 1, its workers' the next one
        f"killed/first/checkpoints/step-0000000{step}-2/manifest.json" for step in "36"
    )
    with subprocess.Popen(
        command("jobs.train", options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 120
        while not store.exists(first) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
    assert store.exists(first) and not store.exists(second)
    return store, options


def go_on(killed: tuple[Storage, dict[str, str]], runs: str, **changed: str) -> tuple[Storage, str]:
    """Continue a copy of the killed run below `runs`; the run's folder, and what the job said."""
    store, options = killed
    for key in filter(lambda key: "." in key, store.list("killed")):  # no markers of folders
        store.put(f"{runs}/{key.removeprefix('killed/')}", store.get(key))
    job = run_job("jobs.train", {**options, "runs": f"{store.url}/{runs}", **changed})
    assert job.returncode == 0, job.stderr
    run = open_storage(f"{store.url}/{runs}/first", StorageConfig(options["storage.endpoint"]))
    return run, job.stderr


@pytest.fixture(scope="module")
def continued(killed) -> tuple[Storage, str]:
    return go_on(killed, "continued", profile="true")


def losses_at(run: Storage) -> list[tuple]:
    return losses([json.loads(line) for line in run.get("metrics.jsonl").splitlines()])


def test_a_run_in_a_bucket_that_was_killed_equals_one_in_files_that_was_not(trained, continued):
    run, _ = continued
    assert losses_at(run) == losses(metrics(trained[0]))
    for name in ("student", "teacher", "statistics"):
        expected, found = final_weights(trained[0], name), final_weights(run, name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert any(key.startswith("panels/") for key in run.list())


def test_a_run_with_too_few_steps_left_says_that_it_measures_none(continued):
    assert "--profile takes 6 steps, 3 are left" in continued[1]
    assert not list(continued[0].list("profile"))


def test_a_killed_run_goes_on_with_fewer_workers(trained, killed):
    run, _ = go_on(killed, "fewer", workers="1")
    stages = [checkpoint.zero_stage for checkpoint in list_checkpoints(run)]
    assert (stages[0], stages[-1]) == (1, 0), "a worker alone shards nothing"
    for one, two in zip(losses_at(run), losses(metrics(trained[0])), strict=True):
        assert one == pytest.approx(two, rel=2e-3)


@pytest.mark.slow
def test_a_run_that_goes_on_draws_the_dropout_of_one_that_was_not_interrupted(trained, tmp_path):
    options = {**trained[1], "model.dropout": "0.3", "runs": str(tmp_path / "whole")}
    assert run_job("jobs.train", options).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (last,) = (tmp_path / "parts/first/checkpoints").glob("step-00000006-*")
    shutil.rmtree(last)
    assert run_job("jobs.train", {**options, "runs": str(tmp_path / "parts")}).returncode == 0
    expected, found = (final_weights(tmp_path / f"{name}/first") for name in ("whole", "parts"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_source_only_trains_without_teacher_projection_and_target_images(trained, tmp_path):
    _, options = trained
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(f"{options['data.target']}/manifest.arrow", target)  # without the shards
    options = {**options, "method": "source_only", "data.target": str(target)}
    job = run_job("jobs.train", {**options, "runs": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    assert not any(name.startswith("projection") for name in final_weights(tmp_path / "first"))
    assert not list((tmp_path / "first").rglob("teacher-*"))


def test_evaluate_reports_student_and_teacher_with_and_without_adabn(trained):
    run, options = trained
    job = run_job(
        "jobs.evaluate",
        {"run": str(run), "adapt_data": options["data.target"], "workers": "2"},
    )
    assert job.returncode == 0, job.stderr
    (written,) = (run / "evaluation").glob("labelled-*.json")
    report = json.loads(written.read_text())
    assert set(report["rows"]) == {"student", "teacher", "student + AdaBN", "teacher + AdaBN"}
    final = [line for line in metrics(run) if "student_miou" in line][-1]
    assert report["rows"]["student"]["miou"] == pytest.approx(final["student_miou"], abs=0.01)
    assert f"{report['rows']['teacher']['miou']:.1f}" in job.stdout
