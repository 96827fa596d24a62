"""Real parts for tests: an S3 server, a Ray cluster of two cores, and small data sets."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg, write_png

from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, free_ports, run_s3_server

NUM_CLASSES = 5
# What `ray.init` chooses. A process reads it when it imports Ray, and those that tests fork have
# done so before any cluster starts.
os.environ["RAY_AUTH_MODE"] = "token"


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are there for `pytest -m gpu` alone: else the numbers are a CPU's, on any machine."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def aws_environment() -> Iterator[None]:
    """Credentials of the test server for this process and all it starts; never a person's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("s3")
    with run_s3_server(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(aws_environment: None) -> Iterator[str]:
    """A local cluster of two cores; yields its address, for RAY_ADDRESS of other processes."""
    import ray

    context = ray.init(
        "local",  # never a cluster that happens to run on this machine
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _system_config={"metrics_report_interval_ms": 1000},
        logging_level="error",
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """`make_folder(root, count=12, size=(48, 64), seed=0)` writes images/, labels/, classes.json.

    Labels are blocks of 5 classes and ignored pixels; class 4 is rare.
    """

    def make(root: Path, count: int = 12, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for name in ("images", "labels"):
            (root / name).mkdir(parents=True)
        for i in range(count):
            blocks = rng.integers(0, NUM_CLASSES - 1, (size[0] // 8, size[1] // 8))
            blocks[rng.random(blocks.shape) < 0.1] = 255
            if i % 4 == 0:
                blocks[0, :2] = NUM_CLASSES - 1
            label = np.kron(blocks, np.ones((8, 8))).astype(np.uint8)
            image = rng.integers(0, 256, (3, size[0] // 8, size[1] // 8))
            image = np.kron(image, np.ones((1, 8, 8))).astype(np.uint8)
            write_jpeg(torch.from_numpy(image), str(root / f"images/frame{i:03d}.jpg"), 90)
            write_png(torch.from_numpy(label)[None], str(root / f"labels/frame{i:03d}.png"))
        classes = [
            {"train_id": i, "name": f"class{i}", "color": [40 * i, 0, 255 - 40 * i]}
            for i in range(NUM_CLASSES)
        ]
        (root / "classes.json").write_text(json.dumps({"classes": classes}))
        return root

    return make


@pytest.fixture(scope="session")
def folder(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 labelled images of 64x48, 5 classes. Read only: make a folder to change one."""
    return make_folder(tmp_path_factory.mktemp("folder") / "data")


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., None]:
    """`write_dataset(folder, storage, labels=True, per_shard=5, references=None)`, without Ray.

    `references` is a folder like `folder`; its images of the same name become the references.
    """
    from cluster.conversion import build_shard
    from cluster.datasets import find_sources, read_taxonomy
    from cluster.layouts import DATASETS
    from cluster.manifest import write_manifest
    from cluster.shards import Shard

    def write(
        folder: Path,
        storage,
        labels: bool = True,
        per_shard: int = 5,
        references: Path | None = None,
    ) -> None:
        taxonomy = read_taxonomy(folder, DATASETS["folder"], None)
        sources = find_sources(folder, DATASETS["folder"], None, None, labels)
        if references is not None:
            paired = [references / "images" / source.image.name for source in sources]
            sources = [
                replace(source, reference=path if path.is_file() else None)
                for source, path in zip(sources, paired, strict=True)
            ]
        shards = []
        for begin in range(0, len(sources), per_shard):
            data, rows = build_shard(sources[begin : begin + per_shard], taxonomy, None)
            shards.append((Shard(f"shard-{begin:05d}.arrow", len(data), 0), rows))
            storage.put(shards[-1][0].name, data)
        write_manifest(storage, taxonomy, shards, labelled=labels, options={})

    return write


@pytest.fixture
def unused_port() -> int:
    return free_ports(1)[0]
