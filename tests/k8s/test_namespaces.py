"""What Kubernetes would do, in network namespaces: a job over faults of network and pods."""

import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.checkpoint_weights import read_weights
from cluster.storage import Storage, StorageConfig, open_storage
from jobs.k8s import TrainJob, build
from tests.jobs.training import TINY
from tests.k8s.manifests import Object, find
from tests.k8s.namespaces import Network, network, ray_env, size
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

HEAD = "train-x1x2x-head-svc.sepico.svc.cluster.local"
PART = {"app.kubernetes.io/part-of": "sepico"}
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
STEPS, FAULT_AFTER = 80, 10
OPTIONS = {
    **{k: v for k, v in TINY.items() if k not in ("workers", "panel_every")},
    "optimization.iterations": str(STEPS),
    "optimization.global_batch": "6",
    "optimization.reference_batch": "6",
    "checkpoint_every": "5",
    "validation.every": str(STEPS),
    "log_every": "5",
    "storage.endpoint": "http://seaweedfs:8333",
}
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("nft"), reason="needs root, iproute2 and nftables"
    ),
    pytest.mark.skipif(
        Path(__file__).is_relative_to("/tmp"), reason="a pod has a /tmp of its own, without this"
    ),
]


@dataclass
class Cluster:
    """The local overlay's store, a head, and workers; some wait to replace others."""

    network: Network
    objects: list[Object]
    store: S3Server
    overlay: str
    token: str

    @property
    def storage(self) -> StorageConfig:
        return StorageConfig(endpoint=self.store.endpoint)

    def group(self, name: str) -> Object:
        spec = find(self.objects, "RayJob", "train")["spec"]["rayClusterSpec"]
        return spec["headGroupSpec"] if name == "head" else spec["workerGroupSpecs"][0]

    def env(self, name: str) -> dict[str, str]:
        return {**ray_env(self.group(name), self.network.pods[name], HEAD, self.token), **KEYS}

    def start(self, name: str) -> None:
        env = self.env(name)
        limits = self.group(name)["template"]["spec"]["containers"][0]["resources"]["limits"]
        command = ["/bin/bash", "-c", "--", f"ulimit -n 65536; {env['KUBERAY_GEN_RAY_START_CMD']}"]
        self.network.pods[name].start(command, env, shm=size(limits["memory"]))

    def command(self, name: str, words: str, token: str = "") -> list[str]:
        """A shell command in the network of a pod that runs nothing else."""
        auth = ["env", "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={token or self.token}"]
        return ["ip", "netns", "exec", f"sepico-{name}", *auth, "bash", "-c", words]

    def ray_job(self, words: str, token: str = "") -> subprocess.CompletedProcess:
        """`ray job` as KubeRay's submitter calls it."""
        words = f"ray job {words} --address http://{HEAD}:8265"
        return subprocess.run(self.command("submit", words, token), capture_output=True)

    def submit(self, name: str) -> "subprocess.Popen[str]":
        """Submit a rendered job as KubeRay's submitter does, and follow it."""
        job = TrainJob(
            name, preset="demo", bucket="s3://sepico", source="day", target="night",
            validation="day", workers=3, min_workers=3, overlay=self.overlay,
            options=" ".join(f"--{key} {value}" for key, value in OPTIONS.items()),
        )  # fmt: skip
        address = f"--address http://{HEAD}:8265"
        words = (
            f"ray job submit {address} --no-wait --submission-id {name}"
            f" -- {build(job)['spec']['entrypoint']} && ray job logs {address} --follow {name}"
        )
        return subprocess.Popen(
            self.command("submit", words), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, name: str) -> Storage:
        return open_storage(f"s3://sepico/runs/{name}", self.storage)

    def step(self, name: str) -> int:
        """Step of the newest checkpoint of a run."""
        saved = list_checkpoints(self.run(name))
        return saved[-1].step if saved else 0


@pytest.fixture(scope="module")
def cluster(rendered, k8s, folder, write_dataset, tmp_path_factory) -> Iterator[Cluster]:
    objects = rendered["local-cpu"]
    with network(tmp_path_factory.mktemp("pods")) as net:
        store = net.add("store", {"app.kubernetes.io/name": "seaweedfs"})
        net.add("head", {**PART, "ray.io/node-type": "head"})
        for i in range(5):
            net.add(f"worker{i}", {**PART, "ray.io/node-type": "worker"})
        net.add("submit", PART)
        net.add("stranger", {"app": "shell"})
        net.name_hosts({"seaweedfs": store, HEAD: net.pods["head"]})
        pod = find(objects, "StatefulSet", "seaweedfs")["spec"]["template"]["spec"]
        args = [arg.replace("/data", "/tmp") for arg in pod["containers"][0]["args"]]
        store.start([str(Path(sysconfig.get_path("scripts")) / "weed"), *args], KEYS)
        server = S3Server(f"http://{store.address}:8333")
        overlay = str(k8s / "overlays" / "local-cpu")
        made = Cluster(net, objects, server, overlay, secrets.token_hex(16))
        net.enforce(objects)
        wait_until(server.is_ready)
        server.make_bucket("sepico")
        for name, labels in (("day", True), ("night", False)):
            write_dataset(folder, open_storage(f"s3://sepico/{name}", made.storage), labels=labels)
        made.start("head")
        for name in ("worker0", "worker1", "worker2"):
            made.start(name)
        wait_until(lambda: made.ray_job("list").returncode == 0, 120)
        yield made


@pytest.fixture(scope="module")
def calm(cluster) -> dict[str, torch.Tensor]:
    """Weights of an undisturbed run."""
    return finish(cluster, "calm", cluster.submit("calm"))


def test_a_token_and_a_policy_stand_before_the_job_api(cluster):
    assert cluster.ray_job("list", token="wrong").returncode
    reach = f"timeout 5 bash -c '</dev/tcp/{HEAD}/8265'"
    assert subprocess.run(cluster.command("submit", reach)).returncode == 0
    assert subprocess.run(cluster.command("stranger", reach)).returncode == 124  # no answer at all


def test_a_link_cut_for_a_minute_leaves_the_result_as_it_is(cluster, calm):
    worker = cluster.network.pods["worker0"]
    with disturbed(cluster, "cut", calm):
        worker.set_link("down")
        time.sleep(60)  # this long is what is tested
        # Its raylet ends when it hears that it was given up, and is started again.
        worker.set_link("up")


def test_a_worker_killed_and_replaced_leaves_the_result_as_it_is(cluster, calm):
    with disturbed(cluster, "killed", calm):
        cluster.network.pods["worker1"].kill()
        cluster.start("worker3")


def test_a_deleted_worker_leaves_a_checkpoint_and_the_result_as_it_is(cluster, calm):
    container = cluster.group("worker2")["template"]["spec"]["containers"][0]
    with disturbed(cluster, "deleted", calm):
        begin, before = time.monotonic(), cluster.step("deleted")
        worker = cluster.network.pods["worker2"]
        worker.run(container["lifecycle"]["preStop"]["exec"]["command"], cluster.env("worker2"))
        print(f"preStop: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        worker.kill()
        assert cluster.step("deleted") > before
        cluster.start("worker4")


@contextmanager
def disturbed(cluster: Cluster, name: str, calm: dict[str, torch.Tensor]) -> Iterator[None]:
    """A run with a fault in it, which ends with the weights of the calm one."""
    job = cluster.submit(name)
    wait_until(lambda: cluster.step(name) >= FAULT_AFTER, 180, job)
    begin, before = time.monotonic(), cluster.step(name)
    yield
    wait_until(lambda: cluster.step(name) > before + 10, 240, job)
    print(f"{name}: {time.monotonic() - begin:.0f} s from the fault to new steps", file=sys.stderr)
    weights = finish(cluster, name, job)
    assert [key for key, value in calm.items() if not torch.equal(value, weights[key])] == []


def finish(cluster: Cluster, name: str, job: "subprocess.Popen[str]") -> dict[str, torch.Tensor]:
    """Wait for a run's end; its weights."""
    output, _ = job.communicate(timeout=400)
    assert "succeeded" in output, output[-3000:]
    saved = list_checkpoints(cluster.run(name))[-1]
    assert saved.step == STEPS
    return read_weights(cluster.run(name), saved, "student")


def wait_until(condition: Callable[[], object], seconds: float = 60, job=None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if job is not None and job.poll() is not None:
            raise AssertionError(f"the job ended: {job.stdout.read()[-3000:]}")
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
