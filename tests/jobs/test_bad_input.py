"""A mistake is one line that names the thing and the fix, and leaves nothing behind."""

import re
import shutil

import pytest

from cluster.storage import StorageConfig, open_storage
from tests.jobs.training import TINY, run_job


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimization.lrr": "1"}, ["lrr"]),
        ({"optimization.iterations": "many"}, ["optimization.iterations", "many"]),
        ({"config": "no_such_preset"}, ["no_such_preset", "camvid_day2dusk", "demo"]),
        ({"contrast.temperature": "0"}, ["contrast.temperature", "above 0"]),
        ({"workers": "3"}, ["global_batch", "workers 3"]),
        ({"workers": '{"min": 2, "max": 9}'}, ["workers is 2 to 9", "global_batch 4"]),
        ({"data.source": "s3://no-such-bucket/day"}, ["no-such-bucket", "create it"]),
        ({"storage.endpoint": "http://127.0.0.1:9"}, ["127.0.0.1:9", "endpoint"]),
        ({"data.source": "nowhere"}, ["nowhere", "jobs.ingest"]),
        ({"optimization.global_batch": "64"}, ["global_batch 64", "12 images"]),
        ({"data.rcs_min_pixels": "130"}, ["class4", "data.rcs_min_pixels"]),
        ({"data.crop_height": "320"}, ["smaller than the crop", "crop_height"]),
        ({"data.crop_height": "30"}, ["data.crop_height 30", "multiple"]),
        ({"model.num_classes": "3"}, ["model.num_classes is 3", "5 classes", "set it to 0"]),
        ({"model.encoder_weights": "nowhere.pth"}, ["nowhere.pth"]),
        ({"model.encoder": "no_such_encoder"}, ["no_such_encoder"]),
        ({"engine.precision": "fp16"}, ["engine.precision fp16 needs GPUs"]),
        ({"workers": "4", "cpus_per_worker": "1"}, ["workers: 4", "2 CPU", "--workers"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_training_refuses(change, words, data, joined, s3, tmp_path):
    options = {**TINY, **data, "runs": str(tmp_path), "run": "bad", **change}
    if "s3://" in options["data.source"]:
        options["storage.endpoint"] = s3.endpoint
    elif "storage.endpoint" in change:
        options["data.source"] = "s3://bucket/day"
    job = run_job("jobs.train", options)
    assert job.returncode != 0
    lines = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, job.stderr
    assert "Traceback" not in job.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())


def test_training_refuses_missing_credentials(data, joined, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {**TINY, **data, "data.source": "s3://bucket/day", "runs": str(tmp_path)}
    job = run_job("jobs.train", {**options, "storage.endpoint": "http://127.0.0.1:9"})
    assert job.returncode != 0
    assert "AWS_ACCESS_KEY_ID" in job.stderr
    assert "Traceback" not in job.stderr


def test_a_run_is_not_continued_with_other_settings(data, joined, tmp_path):
    storage = open_storage(str(tmp_path / "run"), StorageConfig())
    storage.put("config.json", b'{"method": "source_only"}')
    options = {**TINY, **data, "run": str(tmp_path / "run")}
    job = run_job("jobs.train", options)
    assert job.returncode != 0
    assert "was started with method = 'source_only'" in job.stderr


def test_a_run_that_does_not_exist_is_not_evaluated(tmp_path):
    job = run_job("jobs.evaluate", {"run": str(tmp_path / "none")})
    assert job.returncode != 0
    assert "no run at" in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.slow
def test_a_lost_object_ends_the_run_with_its_key_and_is_not_tried_again(data, joined, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(data["data.target"], target)
    for shard in target.glob("shard-*"):
        shard.unlink()
    lost = {**data, "data.target": str(target), "run": "lost"}
    job = run_job("jobs.train", {**TINY, **lost, "runs": str(tmp_path)})
    assert job.returncode == 1
    line = job.stderr.splitlines()[-1]
    assert re.match(r"error: run .*/lost: sample 'frame\d+' is unreadable: .*no such object", line)
    # Each start of the workers leaves one, unless Ray ends rank 0 before it does.
    assert len(list((tmp_path / "lost").glob("tensorboard/*"))) <= 1


def test_a_run_that_diverges_names_terms_and_samples_and_is_not_tried_again(data, joined, tmp_path):
    wild = {"optimization.lr": "1e30", "checkpoint_every": "1", "run": "wild"}
    job = run_job("jobs.train", {**TINY, **data, **wild, "runs": str(tmp_path)})
    assert job.returncode == 1
    line = job.stderr.splitlines()[-1]
    for part in ("step 1 is not finite", "source_ce", "frame0", "last checkpoint is of step 1"):
        assert part in line
    (saved,) = (tmp_path / "wild/checkpoints").iterdir()
    assert saved.name.startswith("step-00000001-")
