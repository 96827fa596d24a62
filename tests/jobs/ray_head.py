"""A Ray cluster as `ray start --head` makes it, with token authentication, and submitted jobs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.s3_server import free_ports

RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
CHECKOUT = Path(__file__).parents[2]


# A submitted job's driver, and what Ray's libraries keep for the life of the cluster.
RAYS_ACTORS = {
    "JobSupervisor",
    "_AutoscalingCoordinatorActor",
    "ActorLocationTracker",
    "_StatsActor",
}


@dataclass
class Head:
    """A head node on loopback, and how to talk to it."""

    dashboard: str
    token: str
    environment: dict[str, str]

    def submit(
        self, *words: str, wait: bool = True, token: str | None = None
    ) -> subprocess.CompletedProcess:
        """`ray job submit` of this checkout, as the documentation has it; returns its log."""
        flags = ["--working-dir", ".", "--runtime-env", "ray-job.yaml"]
        flags += [] if wait else ["--no-wait"]
        return self.ray("job", "submit", *flags, "--", "python", "-m", *words, token=token)

    def ray(self, *words: str, token: str | None = None) -> subprocess.CompletedProcess:
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard}
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = token
        return subprocess.run(
            [RAY, *words],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def get(self, path: str) -> dict:
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def living_actors(self) -> list[str]:
        """Classes of the actors that are alive, but for Ray's own."""
        actors = self.get(
            "/api/v0/actors?filter_keys=state&filter_predicates==&filter_values=ALIVE"
        )
        names = [actor["class_name"] for actor in actors["data"]["result"]["result"]]
        return [name for name in names if name not in RAYS_ACTORS]


@contextmanager
def run_head(cpus: int = 2) -> Iterator[Head]:
    """Start a head node; raises RuntimeError with its output when it does not come up."""
    # Paths of sockets have to be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    ports = free_ports(8)
    names = (
        "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
        "node-manager-port",
    )  # fmt: skip
    token = secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": "",
    }
    command = [
        RAY, "start", "--head", "--block", "--include-dashboard=true", f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        "--object-store-memory=200000000", "--disable-usage-stats",
        *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
    ]  # fmt: skip
    head = Head(f"http://127.0.0.1:{ports[1]}", token, environment)
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while not _answers(head):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray head: {(folder / 'out').read_text()[-3000:]}")
            time.sleep(0.5)
        yield head
    finally:
        process.terminate()  # `ray start --block` ends what it started
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(head: Head) -> bool:
    try:
        return isinstance(head.get("/api/jobs/"), list)
    except (urllib.error.URLError, OSError):
        return False
