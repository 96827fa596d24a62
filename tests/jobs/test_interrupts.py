"""A job that is interrupted ends by itself: nothing of it stays, and the run goes on from there."""

import json
import signal
import subprocess
import time

import pytest
import ray

from cluster.checkpoint_format import list_checkpoints
from cluster.storage import StorageConfig, open_storage
from tests.jobs.training import command


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_gives_its_run_and_its_workers_back(
    joined, trained, tmp_path, sent, code
):
    options = {**trained[1], "runs": str(tmp_path), "optimization.iterations": "100000"}
    options |= {"checkpoint_every": "2", "validation.every": "100000", "workers": "1"}
    run = open_storage(str(tmp_path / "first"), StorageConfig())
    with subprocess.Popen(command("jobs.train", options), stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + 120
        while not list_checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(sent)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    assert list_checkpoints(run)
    assert json.loads(run.get(run.list("lease")[-1]))["expires"] == 0
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
