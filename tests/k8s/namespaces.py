"""Pods without Kubernetes: processes in network, process and mount namespaces of their own.

A pod has an address on a bridge, its own /tmp and /dev/shm over a read-only root, the
NetworkPolicies of the manifests as nftables rules, and is started with what KubeRay makes of a
manifest. Host names stand in a hosts file, not in DNS. Needs root, iproute2 and nftables.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.k8s.network import Peer, is_peer, selects

BRIDGE, NODE = "sepico0", "10.77.0.1"
UNITS = {"Mi": 2**20, "Gi": 2**30}


@dataclass
class Pod:
    """One pod; `start` is the kubelet's start of its first container."""

    name: str
    address: str
    labels: dict[str, str]
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def peer(self) -> Peer:
        return Peer(self.labels)

    def start(self, command: list[str], env: dict[str, str], shm: int = 2**30) -> None:
        """Run a container's command as process 1 of the pod; if it ends, it is started again."""
        tmp = self.folder / "tmp"
        tmp.mkdir()
        setup = (
            f"mount --bind {tmp} /tmp && mount -t tmpfs -o size={shm} tmpfs /dev/shm"
            f" && mount -o remount,bind,ro / && hostname {self.name} && cd /"
            f" && exec {shlex.join(command)}"
        )
        isolated = "unshare --mount --uts --pid --fork --mount-proc --kill-child bash -c"
        kubelet = f"while true; do {isolated} {shlex.quote(setup)}; sleep 1; done"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", "-c", kubelet],
                env=container_env(env),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        """Run a command in the running pod, as `kubectl exec` and a preStop hook do."""
        unshare = _child(self.process.pid)
        enter = ["nsenter", "--target", _child(unshare), "--mount", "--uts", "--pid", "--net"]
        return subprocess.run([*enter, *command], env=container_env(env), check=True)

    def kill(self) -> None:
        """End all of its processes at once, without a warning."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def set_link(self, state: str) -> None:
        _sh(f"ip link set {self.name} {state}")


@dataclass
class Network:
    """Pods on one bridge, whose addresses are known before they start."""

    folder: Path
    pods: dict[str, Pod] = field(default_factory=dict)

    def add(self, name: str, labels: dict[str, str]) -> Pod:
        address = f"10.77.0.{10 + len(self.pods)}"
        pod = Pod(f"sepico-{name}", address, labels, self.folder / name)
        pod.folder.mkdir()
        self.pods[name] = pod
        _sh(f"ip netns add {pod.name}")
        _sh(f"ip link add {pod.name} type veth peer name eth0 netns {pod.name}")
        _sh(f"ip link set {pod.name} master {BRIDGE} up")
        for command in (
            "link set lo up",
            f"addr add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {NODE}",  # by which Ray finds the address it has
        ):
            _sh(f"ip -n {pod.name} {command}")
        return pod

    def name_hosts(self, names: dict[str, Pod]) -> None:
        """Let all pods know services by name; `ip netns exec` lays the file over /etc/hosts."""
        lines = ["127.0.0.1 localhost", *(f"{pod.address} {name}" for name, pod in names.items())]
        for pod in self.pods.values():
            folder = Path("/etc/netns") / pod.name
            folder.mkdir(parents=True, exist_ok=True)
            own = f"{pod.address} {pod.name}"  # by which gloo finds the address it has
            (folder / "hosts").write_text("\n".join([*lines, own]) + "\n")

    def enforce(self, objects: list[dict[str, Any]]) -> None:
        """Load the NetworkPolicies among `objects` as nftables rules of every pod."""
        policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
        for pod in self.pods.values():
            rules = "".join(
                self._chain(policies, pod, *side)
                for side in (("Ingress", "from", "saddr", "iif"), ("Egress", "to", "daddr", "oif"))
            )
            command = ["ip", "netns", "exec", pod.name, "nft", "-f", "-"]
            subprocess.run(command, input=f"table inet pod {{\n{rules}}}\n", text=True, check=True)

    def _chain(self, policies: list, pod: Pod, kind: str, key: str, end: str, device: str) -> str:
        mine = [
            p for p in policies if kind in p["policyTypes"] and selects(p["podSelector"], pod.peer)
        ]
        hook = "input" if kind == "Ingress" else "output"
        accepted = [
            "ct state established,related",
            f"{device} lo",
            f"ip {end} {NODE}",  # a pod's own node is always admitted
        ]
        for rule in (rule for policy in mine for rule in policy.get(kind.lower(), [])):
            ports = [f"{p['protocol'].lower()} dport {p['port']}" for p in rule.get("ports", [])]
            for match in self._matches(rule.get(key, []), f"ip {end}"):
                accepted += [f"{match} {port}" for port in ports or [""]]
        lines = "".join(f"    {match} accept\n" for match in accepted)
        policy = "drop" if mine else "accept"
        head = f"type filter hook {hook} priority 0; policy {policy};"
        return f"  chain {hook} {{\n    {head}\n{lines}  }}\n"

    def _matches(self, peers: list, field: str) -> Iterator[str]:
        for peer in peers:
            if block := peer.get("ipBlock"):
                outside = f" {field} != {{ {', '.join(e)} }}" if (e := block.get("except")) else ""
                yield f"{field} {block['cidr']}{outside}"
            yield from (
                f"{field} {pod.address}" for pod in self.pods.values() if is_peer(peer, pod.peer)
            )


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """An empty bridge; ends all pods and removes all of it at the end."""
    made = Network(folder)
    _sh(f"ip link add {BRIDGE} type bridge")
    try:
        _sh(f"ip addr add {NODE}/24 dev {BRIDGE}")
        _sh(f"ip link set {BRIDGE} up")
        yield made
    finally:
        for pod in made.pods.values():
            if pod.process and pod.process.returncode is None:
                pod.kill()
            subprocess.run(["ip", "netns", "del", pod.name])
            subprocess.run(["rm", "-rf", f"/etc/netns/{pod.name}"])
        _sh(f"ip link del {BRIDGE}")


def ray_env(group: dict[str, Any], pod: Pod, head: str, token: str) -> dict[str, str]:
    """A group's Ray container's environment: the manifest's own, and what KubeRay 1.7 adds.

    `head` is the name of the head's service. KUBERAY_GEN_RAY_START_CMD is the pod's command.
    """
    container = group["template"]["spec"]["containers"][0]
    is_head = "groupName" not in group
    return {
        **{variable["name"]: variable["value"] for variable in container["env"]},
        **({} if is_head else {"FQ_RAY_IP": head, "RAY_IP": head.partition(".")[0]}),
        "RAY_CLUSTER_NAME": "train-x1x2x",
        "RAY_CLOUD_INSTANCE_ID": pod.name,
        "RAY_NODE_TYPE_NAME": "headgroup" if is_head else group["groupName"],
        "KUBERAY_GEN_RAY_START_CMD": _ray_start(group, head, is_head=is_head),
        "RAY_PORT": "6379",
        "RAY_ADDRESS": "127.0.0.1:6379" if is_head else f"{head}:6379",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def _ray_start(group: dict[str, Any], head: str, *, is_head: bool) -> str:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    params = {
        "num-cpus": limits["cpu"],
        "memory": str(size(limits["memory"])),
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        **({"dashboard-host": "0.0.0.0"} if is_head else {"address": f"{head}:6379"}),
        **group["rayStartParams"],
        "block": "true",
    }
    flags = [f"--{key}" if v == "true" else f"--{key}={v}" for key, v in sorted(params.items())]
    return " ".join(["ray start", *(["--head"] if is_head else []), *flags])


def container_env(env: dict[str, str]) -> dict[str, str]:
    """A container's environment: its own and the image's, nothing of this process."""
    root = Path(__file__).parents[2]
    image = {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}:/usr/sbin",
        "PYTHONPATH": str(root),
    }
    return {**image, "RAY_USAGE_STATS_ENABLED": "0", **env}


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()
    return int(number) * UNITS.get(unit, 1)


def _child(pid: int | str) -> str:
    """The one child of a process."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


def _sh(command: str) -> None:
    subprocess.run(shlex.split(command), check=True)
