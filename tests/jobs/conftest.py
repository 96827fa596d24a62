"""Data and a finished run that several tests of jobs look at. Read only."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.storage import StorageConfig, open_storage
from tests.jobs.training import TINY, run_job


@pytest.fixture(scope="module")
def joined(ray_cluster):
    """Jobs started by these tests join the session's cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_cluster)
        yield


@pytest.fixture(scope="session")
def nodes(ray_cluster) -> Iterator[Cluster]:
    """A cluster of a head that holds no worker and two nodes of one core, beside `ray_cluster`.

    A test that loses one of them adds another.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def trained(ray_cluster, data, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A finished run's folder and the options that made it."""
    runs = tmp_path_factory.mktemp("runs")
    options = {**TINY, **data, "runs": str(runs), "run": "first"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_cluster)
        job = run_job("jobs.train", {**options, "profile": "true"})
    assert job.returncode == 0, job.stderr
    (runs / "first.stderr").write_text(job.stderr)
    return runs / "first", options
