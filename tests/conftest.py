"""Real parts for tests: an S3 server, a Ray cluster of two cores, and small data sets."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions
import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg, write_png

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
NUM_CLASSES = 5


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


@dataclass
class S3Server:
    """A SeaweedFS server on loopback."""

    endpoint: str

    def make_bucket(self, name: str) -> str:
        """Create a bucket; returns its URL."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def is_ready(self) -> bool:
        try:
            self.client().list_buckets()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        return True

    def client(self):
        session = boto3.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
        config = botocore.config.Config(
            connect_timeout=1, read_timeout=10, retries={"total_max_attempts": 1}
        )
        return session.client("s3", endpoint_url=self.endpoint, config=config)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("s3")
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    # Every port is given: the defaults are fixed numbers or lie 10,000 above another one.
    names = [
        f"{part}.port{kind}"
        for part in ("master", "volume", "filer", "s3")
        for kind in ("", ".grpc")
    ]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        Path(sysconfig.get_path("scripts")) / "weed", "server", f"-dir={folder}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=500", "-master.volumeSizeLimitMB=64",
        "-filer", "-s3", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{k}={v}" for k, v in ports.items()),
    ]  # fmt: skip
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no S3 server: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.kill()  # a polite end takes 20 s, and there is nothing to save
        process.wait()
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
    from cluster.datasets import find_sources, read_taxonomy
    from cluster.ingest import build_shard
    from cluster.layouts import DATASETS
    from cluster.shards import Shard, write_manifest

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


def _free_ports(count: int) -> list[int]:
    """Distinct ports that are free now: all are held until the last one is found."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
