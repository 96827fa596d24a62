"""From a checkout to a cluster with `ray job submit`: data and runs in a bucket, tokens, ends."""

import json
import time

import pytest

from cluster.checkpoint_format import list_checkpoints
from cluster.storage import StorageConfig, open_storage
from tests.jobs.ray_head import run_head
from tests.jobs.test_sweep import SEARCH, SPACE
from tests.jobs.training import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(s3):
    with run_head() as head:
        yield head


@pytest.fixture(scope="module")
def bucket(s3):
    return s3.make_bucket("submitted")


@pytest.fixture(scope="module")
def ingested(head, s3, bucket, folder):
    """Labelled and unlabelled shards in the bucket, by submitted jobs."""
    for name, labels in {"day": "true", "dusk": "false"}.items():
        job = head.submit(
            "jobs.ingest", "--root", str(folder), "--labels", labels, "--to", f"{bucket}/{name}",
            "--storage.endpoint", s3.endpoint,
        )  # fmt: skip
        assert job.returncode == 0, job.stdout + job.stderr
        assert "wrote 12 images" in job.stdout
    return bucket


@pytest.fixture
def options(ingested, s3):
    """Words of a training on these."""
    options = {
        **TINY,
        "data.source": f"{ingested}/day",
        "data.target": f"{ingested}/dusk",
        "validation.data": f"{ingested}/day",
        "runs": f"{ingested}/runs",
        "run": "first",
        "storage.endpoint": s3.endpoint,
    }
    return options


def words(options):
    return [word for key, value in options.items() for word in (f"--{key}", value)]


def test_a_mistake_reaches_the_submitter_with_its_line_and_exit_code(head, ingested):
    job = head.submit("jobs.train", "--data.sauce", "x")
    assert job.returncode == 1  # `ray job submit` has no other
    log = job.stdout + job.stderr
    assert "error: " in log and "sauce" in log
    assert "exit code 2" in log


def test_a_wrong_token_is_refused(head):
    job = head.submit("jobs.train", "--help", token="wrong" * 8)
    assert job.returncode != 0
    assert "401" in job.stdout + job.stderr or "token" in (job.stdout + job.stderr).lower()


def test_a_run_is_trained_evaluated_and_predicts_by_submitted_jobs(head, options, folder, s3):
    asked = time.time()
    job = head.submit("jobs.train", *words(options))
    assert job.returncode == 0, job.stdout + job.stderr
    events = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events][-1] == "finished"
    storage = StorageConfig(endpoint=s3.endpoint)
    run = open_storage(f"{options['runs']}/first", storage)
    assert list_checkpoints(run)[-1].step == 6
    first = json.loads(run.get("metrics.jsonl").splitlines()[0])
    assert first["step"] == 0
    print(f"{first['time'] - asked:.0f} s from the submission to the end of the first step")

    run_options = ["--run", run.url, "--storage.endpoint", s3.endpoint]
    job = head.submit("jobs.evaluate", *run_options, "--workers", "2")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "mIoU" in job.stdout
    job = head.submit(
        "jobs.predict", *run_options, "--images", str(folder / "images"), "--to",
        f"{options['runs']}/predictions",
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert "predicted 12 images" in job.stdout
    assert not head.living_actors()


def test_a_submitted_sweep_leaves_its_best_preset_in_the_bucket(head, options, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    run = f"{options.pop('runs')}/swept"
    sweep = {**options, **SEARCH, "run": run, "space": str(tmp_path / "space.yaml")}
    job = head.submit("jobs.sweep", *words(sweep))
    assert job.returncode == 0, job.stdout + job.stderr
    folder = open_storage(run, StorageConfig(endpoint=options["storage.endpoint"]))
    assert all(folder.exists(name) for name in ("best.yaml", "trials.csv", "report.html"))
    assert not head.living_actors()


def test_ray_job_stop_keeps_the_last_checkpoint_and_leaves_nobody(head, options, s3):
    long = {"run": "stopped", "optimization.iterations": "100000", "checkpoint_every": "2"}
    job = head.submit("jobs.train", *words({**options, **long}), wait=False)
    name = next(word.strip("'") for word in job.stdout.split() if word.startswith("'raysubmit_"))
    run = open_storage(f"{options['runs']}/stopped", StorageConfig(endpoint=s3.endpoint))
    deadline = time.monotonic() + 200
    while not list_checkpoints(run):
        assert time.monotonic() < deadline, head.ray("job", "logs", name).stdout
        time.sleep(0.2)
    stopped = head.ray("job", "stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert head.get(f"/api/jobs/{name}")["status"] == "STOPPED"
    assert list_checkpoints(run)[-1].step >= 2
    lease = json.loads(run.get(run.list("lease")[-1]))
    assert lease["expires"] == 0  # given back: the next job need not wait until it runs out
    deadline = time.monotonic() + 30
    while head.living_actors() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not head.living_actors()
