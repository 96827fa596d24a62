"""Training as a person runs it: `python -m jobs.train` on a real cluster, files and S3."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from cluster.checkpoint_format import list_checkpoints, read_weights
from cluster.storage import StorageConfig, open_storage

STEPS = 6
TINY = {
    "model.encoder": "tu-test_efficientnet",
    "model.encoder_weights": "null",
    "model.head_channels": "16",
    "model.head_dilations": "[1]",
    "model.projection_channels": "16",
    "model.dropout": "0",  # draws per rank
    "contrast.start": "2",
    "contrast.temperature": "0.5",
    "teacher.ignore_top": "0",
    "teacher.ignore_bottom": "0",
    "teacher.threshold": "0.3",
    "data.crop_height": "32",
    "data.crop_width": "64",
    "data.rcs_min_pixels": "50",
    "data.threads": "1",
    "optimization.iterations": str(STEPS),
    "optimization.global_batch": "4",
    "optimization.reference_batch": "4",
    "optimization.warmup": "0",
    "engine.precision": "fp32",
    "validation.every": "3",
    "checkpoint_every": "3",
    "panel_every": "3",
    "log_every": "1",
    "workers": "2",
    "cpus_per_worker": "1",
}


def command(module: str, options: dict[str, str]) -> list[str]:
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", module, *flags]


def run_job(module: str, options: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command(module, options), capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def joined(ray_cluster):
    """Jobs started by these tests join the session's cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_cluster)
        yield


@pytest.fixture(scope="module")
def data(folder, write_dataset, tmp_path_factory) -> dict[str, str]:
    """The folder's images as labelled source, unlabelled target and validation set."""
    root = tmp_path_factory.mktemp("shards")
    write_dataset(folder, open_storage(str(root / "labelled"), StorageConfig()))
    write_dataset(folder, open_storage(str(root / "unlabelled"), StorageConfig()), labels=False)
    return {
        "data.source": str(root / "labelled"),
        "data.target": str(root / "unlabelled"),
        "validation.data": str(root / "labelled"),
    }


@pytest.fixture(scope="module")
def trained(joined, data, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A finished run's folder and the options that made it."""
    runs = tmp_path_factory.mktemp("runs")
    options = {**TINY, **data, "runs": str(runs), "run": "first"}
    job = run_job("jobs.train", options)
    assert job.returncode == 0, job.stderr
    return runs / "first", options


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["source_ce"], line["mix_ce"]) for line in lines if "mix_ce" in line]


def final_weights(url: str | Path, name: str = "student") -> dict[str, torch.Tensor]:
    storage = open_storage(str(url), StorageConfig())
    return read_weights(storage, list_checkpoints(storage)[-1], name)


def test_a_run_leaves_config_metrics_events_checkpoints_and_panels(trained):
    run, _ = trained
    assert json.loads((run / "config.json").read_text())["model"]["num_classes"] == 5
    assert [line["step"] for line in metrics(run) if "source_ce" in line] == list(range(STEPS))
    assert [line["step"] for line in metrics(run) if "student_miou" in line] == [2, 5]
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "panels/step-00000003.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((run / "checkpoints/step-00000006-1/manifest.json").read_text())
    assert {"student.safetensors", "teacher.safetensors"} <= set(manifest["files"])
    assert not list(run.rglob("*.tmp*"))


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
    before = (run / "checkpoints/step-00000006-1/student.safetensors").read_bytes()
    job = run_job("jobs.train", options)
    assert job.returncode == 0, job.stderr
    assert load(before).keys() == final_weights(run).keys()
    assert (run / "checkpoints/step-00000006-1/student.safetensors").read_bytes() == before


def test_one_worker_and_two_workers_see_the_same_losses(trained, tmp_path):
    run, options = trained
    job = run_job("jobs.train", {**options, "workers": "1", "runs": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    again = run_job("jobs.train", {**options, "runs": str(tmp_path)})
    assert again.returncode != 0
    assert "has a checkpoint of 1 workers, now workers is 2" in again.stderr
    pairs = zip(losses(metrics(tmp_path / "first")), losses(metrics(run)), strict=True)
    for one, two in pairs:
        assert one == pytest.approx(two, rel=2e-3)


def test_training_from_s3_gives_the_losses_of_files(trained, s3, folder, write_dataset):
    run, options = trained
    bucket = s3.make_bucket("training")
    storage = StorageConfig(endpoint=s3.endpoint)
    write_dataset(folder, open_storage(f"{bucket}/labelled", storage))
    write_dataset(folder, open_storage(f"{bucket}/unlabelled", storage), labels=False)
    on_s3 = {
        "data.source": f"{bucket}/labelled",
        "data.target": f"{bucket}/unlabelled",
        "validation.data": f"{bucket}/labelled",
        "runs": f"{bucket}/runs",
        "storage.endpoint": s3.endpoint,
    }
    job = run_job("jobs.train", {**options, **on_s3})
    assert job.returncode == 0, job.stderr
    remote = open_storage(f"{bucket}/runs/first", storage)
    lines = [json.loads(line) for line in bytes(remote.get("metrics.jsonl")).splitlines()]
    assert losses(lines) == losses(metrics(run))
    assert any(key.startswith("panels/") for key in remote.list())


def test_a_killed_run_started_again_ends_as_if_never_killed(trained, tmp_path):
    run, options = trained
    killed = {**options, "runs": str(tmp_path)}
    manifest = tmp_path / "first/checkpoints/step-00000003-1/manifest.json"
    with subprocess.Popen(
        command("jobs.train", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 120
        while not manifest.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
    assert not (tmp_path / "first/checkpoints/step-00000006-1/manifest.json").exists()
    again = run_job("jobs.train", killed)
    assert again.returncode == 0, again.stderr
    for name in ("student", "teacher", "statistics"):
        expected, found = final_weights(run, name), final_weights(tmp_path / "first", name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_source_only_trains_without_teacher_and_projection(trained, tmp_path):
    _, options = trained
    job = run_job("jobs.train", {**options, "method": "source_only", "runs": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    assert not any(name.startswith("projection") for name in final_weights(tmp_path / "first"))
    assert not list((tmp_path / "first").rglob("teacher.safetensors"))


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
