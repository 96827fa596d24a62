"""A real S3 server on loopback, for tests and benchmarks."""

from __future__ import annotations

import json
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


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


@contextmanager
def run_s3_server(folder: Path) -> Iterator[S3Server]:
    """Serve from a folder. Raises RuntimeError with the server's log when it does not start."""
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
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        Path(sysconfig.get_path("scripts")) / "weed", "server", f"-dir={folder}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=500", "-master.volumeSizeLimitMB=64",
        # Of chunks of 4 MB, the default, it would read a whole one for a range over 256 KB.
        "-filer", "-filer.maxMB=1", "-s3", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{k}={v}" for k, v in ports.items()),
    ]  # fmt: skip
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.kill()  # a polite end takes 20 s, and there is nothing to save
        process.wait()


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now: all are held until the last one is found."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
