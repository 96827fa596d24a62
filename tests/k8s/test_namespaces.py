"""What Kubernetes would do, in network namespaces: a job over faults of network and pods."""

import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.storage import StorageConfig, open_storage
from jobs.k8s import TrainJob, build
from tests.jobs.training import TINY
from tests.k8s.manifests import Object, commands, find
from tests.k8s.namespaces import Network, Pod, network, ray_env, ray_start, size
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

HEAD = "train-x1x2x-head-svc.sepico.svc.cluster.local"
PART = {"app.kubernetes.io/part-of": "sepico"}
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
STEPS = 100
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
]


@dataclass
class Cluster:
    """The local overlay's store, a head, and workers; some wait to replace others."""

    network: Network
    objects: list[Object]
    store: S3Server
    token: str

    def group(self, pod: Pod) -> Object:
        spec = find(self.objects, "RayJob", "train")["spec"]["rayClusterSpec"]
        is_head = pod.labels["ray.io/node-type"] == "head"
        return spec["headGroupSpec"] if is_head else spec["workerGroupSpecs"][0]

    def env(self, pod: Pod) -> dict[str, str]:
        group = self.group(pod)
        start = ray_start(group, HEAD, is_head="groupName" not in group)
        return {**ray_env(group, pod, HEAD, start, self.token), **KEYS}

    def start(self, name: str) -> Pod:
        pod, group = self.network.pods[name], self.group(self.network.pods[name])
        env, limits = (
            self.env(pod),
            group["template"]["spec"]["containers"][0]["resources"]["limits"],
        )
        command = ["/bin/bash", "-c", "--", env["KUBERAY_GEN_RAY_START_CMD"]]
        pod.start(command, env, shm=size(limits["memory"]))
        return pod

    def delete(self, pod: Pod) -> float:
        """What the kubelet does with a pod that is deleted: preStop, then the end. Its seconds."""
        container = self.group(pod)["template"]["spec"]["containers"][0]
        begin = time.monotonic()
        hook = container["lifecycle"]["preStop"]["exec"]["command"]
        pod.run(hook, self.env(pod), check=True, capture_output=True)
        took = time.monotonic() - begin
        pod.kill()
        return took

    def submitter(self, words: str, token: str, source: str = "submit") -> list[str]:
        """A `ray job` command from the submitter's namespace."""
        pod = self.network.pods[source]
        return [
            "ip", "netns", "exec", pod.name, "env", "RAY_AUTH_MODE=token",
            f"RAY_AUTH_TOKEN={token}", "bash", "-c", words,
        ]  # fmt: skip

    def submit(self, name: str) -> "subprocess.Popen[str]":
        """Submit a job as KubeRay's submitter does, and follow it."""
        job = TrainJob(
            name, preset="demo", bucket="s3://sepico", source="day", target="night",
            validation="day", workers=3, min_workers=3, overlay=str(self.overlay),
            options=" ".join(f"--{k} {v}" for k, v in OPTIONS.items()),
        )  # fmt: skip
        entrypoint = build(job)["spec"]["entrypoint"]
        assert commands(entrypoint, {})
        address = f"--address http://{HEAD}:8265"
        words = (
            f"ray job submit {address} --no-wait --submission-id {name} -- {entrypoint}"
            f" && ray job logs {address} --follow {name}"
        )
        return subprocess.Popen(
            self.submitter(words, self.token), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def step(self, name: str) -> int:
        """Step of the newest checkpoint of a run."""
        saved = list_checkpoints(self.run(name))
        return saved[-1].step if saved else 0

    def run(self, name: str):
        return open_storage(f"s3://sepico/runs/{name}", self.storage)

    @property
    def storage(self) -> StorageConfig:
        return StorageConfig(endpoint=self.store.endpoint)

    overlay: Path = Path()


@pytest.fixture
def cluster(rendered, k8s, folder, write_dataset, tmp_path) -> Iterator[Cluster]:
    objects = rendered["local-cpu"]
    with network(tmp_path) as net:
        store = net.add("store", {"app.kubernetes.io/name": "seaweedfs"})
        net.add("head", {**PART, "ray.io/node-type": "head"})
        for i in range(5):
            net.add(f"worker{i}", {**PART, "ray.io/node-type": "worker"})
        net.add("submit", PART)
        net.add("stranger", {"app": "shell"})
        net.name_hosts({"seaweedfs": store, HEAD: net.pods["head"]})
        container = find(objects, "StatefulSet", "seaweedfs")["spec"]["template"]["spec"][
            "containers"
        ][0]
        args = [arg.replace("/data", "/tmp") for arg in container["args"]]
        store.start([str(Path(sysconfig.get_path("scripts")) / "weed"), *args], KEYS)
        made = Cluster(
            net, objects, S3Server(f"http://{store.address}:8333"), secrets.token_hex(16)
        )
        made.overlay = k8s / "overlays" / "local-cpu"
        net.enforce(objects)
        wait_until(made.store.is_ready)
        made.store.make_bucket("sepico")
        for name, labels in (("day", True), ("night", False)):
            write_dataset(folder, open_storage(f"s3://sepico/{name}", made.storage), labels=labels)
        made.start("head")
        for name in ("worker0", "worker1", "worker2"):
            made.start(name)
        yield made


def test_a_job_gives_the_same_result_over_a_cut_link_a_killed_worker_and_a_deleted_one(cluster):
    pods, submitter = cluster.network.pods, cluster.submitter
    status = f"ray job list --address http://{HEAD}:8265"
    wait_until(lambda: subprocess.run(submitter(status, cluster.token)).returncode == 0, 120)
    assert subprocess.run(submitter(status, "wrong")).returncode
    probe = f"timeout 5 bash -c '</dev/tcp/{HEAD}/8265'"
    assert subprocess.run(submitter(probe, "")).returncode == 0
    assert subprocess.run(submitter(probe, "", source="stranger")).returncode

    finish(cluster.submit("calm"))
    assert cluster.step("calm") == STEPS

    job, times = cluster.submit("faults"), {}
    wait_until(lambda: cluster.step("faults") >= 10, 180, job)
    with measured(cluster, times, "link of a worker cut for 60 s", job):
        pods["worker0"].set_link("down")
        until = time.monotonic() + 60
        wait_until(lambda: time.monotonic() > until, 70, job)
        pods["worker0"].set_link("up")
        # Its raylet ends when it hears that it was given up; the kubelet starts it again.
        wait_until(lambda: pods["worker0"].process.poll() is not None, 120, job)
        cluster.start("worker0")
    with measured(cluster, times, "worker killed and replaced", job):
        pods["worker1"].kill()
        cluster.start("worker3")
    with measured(cluster, times, "worker deleted, drained and replaced", job):
        cluster.start("worker4")
        times["preStop took"] = cluster.delete(pods["worker2"])
    finish(job)
    for what, seconds in times.items():
        print(f"{what}: {seconds:.0f} s", file=sys.stderr)
    weights = [final(cluster, name) for name in ("calm", "faults")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def final(cluster: Cluster, name: str) -> dict[str, torch.Tensor]:
    from cluster.checkpoint_format import read_weights

    run = cluster.run(name)
    return read_weights(run, list_checkpoints(run)[-1], "student")


class measured:
    """Seconds from a fault to the first checkpoint after it."""

    def __init__(self, cluster: Cluster, times: dict[str, float], what: str, job) -> None:
        self._args = cluster, times, what, job

    def __enter__(self) -> None:
        self._begin, self._step = time.monotonic(), self._args[0].step("faults")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            cluster, times, what, job = self._args
            wait_until(lambda: cluster.step("faults") > self._step + 5, 300, job)
            times[what] = time.monotonic() - self._begin


def finish(job: "subprocess.Popen[str]") -> None:
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0 and "SUCC" in output, output[-3000:]


def wait_until(condition: Callable[[], object], seconds: float = 60, job=None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if job is not None and job.poll() is not None:
            raise AssertionError(f"the job ended: {job.stdout.read()[-3000:]}")
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
