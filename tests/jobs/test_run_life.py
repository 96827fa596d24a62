"""The life of a run beside other writers and on nodes that go away."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.checkpoint_format import list_checkpoints
from cluster.lease import Lease
from cluster.storage import StorageConfig, open_storage
from tests.jobs.training import TINY, command, metrics, run_job

# More steps than any of these tests waits for.
ENDLESS = {"optimization.iterations": "100000", "checkpoint_every": "1000", "max_failures": "0"}


def wait_until(condition, job: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(options: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command("jobs.train", options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_second_writer_is_refused_and_a_fenced_one_commits_nothing(
    ray_cluster,
    data,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    options = {**TINY, **data, **ENDLESS, "runs": str(tmp_path), "run": "one"}
    run = open_storage(str(tmp_path / "one"), StorageConfig())
    with start({**options, "checkpoint_every": "20"}) as job:
        wait_until(lambda: list_checkpoints(run), job)

        second = run_job("jobs.train", options)
        assert second.returncode != 0
        assert f"process {job.pid}, whose lease lasts to" in second.stderr.splitlines()[-1]

        thief = Lease(3, "elsewhere process 1", "token")
        run.put(thief.key, thief.document(time.time() + 3600))
        _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "was taken over by elsewhere process 1" in errors.splitlines()[-1]
    assert {checkpoint.generation for checkpoint in list_checkpoints(run)} == {2}


def drain(cluster: Cluster, node_id: str, seconds: int) -> None:
    subprocess.run(
        [
            Path(sys.executable).parent / "ray", "drain-node", f"--address={cluster.address}",
            f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot instance reclaimed",
            f"--deadline-remaining-seconds={seconds}",
        ],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.slow
def test_an_elastic_run_shrinks_with_the_cluster_and_grows_with_it(
    nodes, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    elastic = {"workers": '{"min": 1, "max": 2}', "checkpoint_every": "90000", "max_failures": "3"}
    options = {**TINY, **data, **ENDLESS, **elastic, "runs": str(tmp_path), "run": "elastic"}
    run = open_storage(str(tmp_path / "elastic"), StorageConfig())

    def workers() -> int:
        found = metrics(tmp_path / "elastic") if run.exists("metrics.jsonl") else []
        return next((line["workers"] for line in reversed(found) if "workers" in line), 0)

    with start(options) as job:
        wait_until(lambda: workers() == 2, job)
        nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
        wait_until(lambda: workers() == 1, job)
        nodes.add_node(num_cpus=1)
        # Ray looks once a minute whether there is room for more.
        wait_until(lambda: workers() == 2, job, seconds=240)
        assert list_checkpoints(run), "it grew without the steps it had done"
        job.kill()
    steps = [line["step"] for line in metrics(tmp_path / "elastic") if "source_ce" in line]
    assert steps == list(range(len(steps))), "a step is missing or was written twice"


@pytest.mark.slow
def test_a_drained_node_gets_a_checkpoint_and_the_run_goes_on_elsewhere(
    nodes,
    data,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    options = {**TINY, **data, **ENDLESS, "runs": str(tmp_path), "run": "drained"}
    run = open_storage(str(tmp_path / "drained"), StorageConfig())

    def starts() -> int:
        return len(list((tmp_path / "drained/tensorboard").glob("events*")))

    with start(options) as job:
        wait_until(starts, job)
        drain(nodes, nodes.list_all_nodes()[-1].node_id, seconds=15)
        nodes.add_node(num_cpus=1)
        wait_until(lambda: list_checkpoints(run), job)
        (saved,) = list_checkpoints(run)
        assert saved.step < 1000
        wait_until(lambda: starts() == 2, job)
        job.kill()
        _, shown = job.communicate()
    assert f"is being drained: checkpoint at step {saved.step}" in shown
    lines = metrics(tmp_path / "drained")
    steps = [line["step"] for line in lines if "source_ce" in line]
    assert steps == list(range(len(steps))), "a step is missing or was written twice"
    assert len(steps) > saved.step
