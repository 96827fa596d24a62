"""The NetworkPolicies admit what Ray needs, and nothing else."""

import pytest

from tests.k8s.network import Peer, admits

PART = {"app.kubernetes.io/part-of": "sepico"}
HEAD = Peer({**PART, "ray.io/node-type": "head"})
WORKER = Peer({**PART, "ray.io/node-type": "worker"})
SUBMITTER = Peer(PART)
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-operator")
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring")
DNS = Peer({"k8s-app": "kube-dns"}, "kube-system")
STRANGER = Peer({"app": "shell"}, "default")
NEIGHBOUR = Peer({"app": "shell"})
STORE = Peer(address="52.216.1.1")
METADATA = Peer(address="169.254.169.254")
PRIVATE = Peer(address="10.1.2.3")
REDIS = Peer({"app.kubernetes.io/name": "redis"})
SEAWEEDFS = Peer({"app.kubernetes.io/name": "seaweedfs"})
API = Peer(address="10.0.0.1")

NEEDED = {
    "a worker registers with the GCS": (WORKER, HEAD, 6379),
    "a worker asks the dashboard": (WORKER, HEAD, 8265),
    "the head's node manager leases a worker's processes": (HEAD, WORKER, 34567),
    "workers exchange objects": (WORKER, WORKER, 45678),
    "a Ray worker process is called, also on its last port": (HEAD, WORKER, 19999),
    "gloo and NCCL connect on ports of the kernel's choice": (WORKER, WORKER, 60999),
    "the submitter submits": (SUBMITTER, HEAD, 8265),
    "the operator asks for the job's state": (OPERATOR, HEAD, 8265),
    "Prometheus reads a worker": (PROMETHEUS, WORKER, 8080),
    "Prometheus reads the autoscaler": (PROMETHEUS, HEAD, 44217),
    "Prometheus reads the dashboard's metrics": (PROMETHEUS, HEAD, 44227),
    "names are resolved": (WORKER, DNS, 53, "UDP"),
    "long answers are resolved": (WORKER, DNS, 53, "TCP"),
    "a worker reads the object store": (WORKER, STORE, 443),
    "the head writes the object store": (HEAD, STORE, 443),
}
REFUSED = {
    "another namespace can't reach the dashboard": (STRANGER, HEAD, 8265),
    "another pod of the namespace can't reach the dashboard": (NEIGHBOUR, HEAD, 8265),
    "another namespace can't reach the GCS": (STRANGER, HEAD, 6379),
    "Prometheus can't reach the dashboard": (PROMETHEUS, HEAD, 8265),
    "the operator can't reach workers": (OPERATOR, WORKER, 8265),
    "an address outside can't reach the client port": (PRIVATE, HEAD, 10001),
    "a worker can't reach the node's metadata": (WORKER, METADATA, 80),
    "a worker can't reach private addresses": (WORKER, PRIVATE, 443),
    "a worker can't talk plain HTTP to the world": (WORKER, STORE, 80),
    "a worker can't talk to the Kubernetes API": (WORKER, API, 443),
    "a worker can't read Redis": (WORKER, REDIS, 6379),
    "the operator can't reach the head's client port": (OPERATOR, HEAD, 10001),
    "a worker can't reach other ports of the DNS server": (WORKER, DNS, 9153),
    "a pod that no policy names can't call": (NEIGHBOUR, STORE, 443),
    "a pod that no policy names can't be called": (STRANGER, NEIGHBOUR, 80),
}


@pytest.mark.parametrize("what", NEEDED)
def test_what_ray_needs_is_admitted(rendered, what):
    for objects in rendered.values():
        assert admits(objects, *NEEDED[what])


@pytest.mark.parametrize("what", REFUSED)
def test_what_ray_does_not_need_is_refused(rendered, what):
    for objects in rendered.values():
        assert not admits(objects, *REFUSED[what])


def test_each_overlay_reaches_its_own_services(rendered):
    assert admits(rendered["local-cpu"], WORKER, SEAWEEDFS, 8333)
    assert not admits(rendered["local-cpu"], STRANGER, SEAWEEDFS, 8333)
    assert admits(rendered["production"], HEAD, REDIS, 6379)
    assert admits(rendered["production"], HEAD, API, 443)
    assert not admits(rendered["gpu"], HEAD, API, 443)
