"""Workers find room on a cluster that grows for what is asked of it.

Ray and its coordinator of requests are real; the pods are entries in the list of nodes.
"""

import json

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.experimental.internal_kv import _internal_kv_get

from cluster.config import WorkerRange
from cluster.workers import place

HEAD = {"node:__internal_head__": 1.0, "memory": 1e9}
GPU_POD, CPU_POD = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}


@pytest.fixture
def autoscale(ray_cluster, monkeypatch):
    """`autoscale(pod, most)`: the cluster's nodes, of which an autoscaler brings one a look, up to
    `most` of them, while what is asked for does not fit."""

    def start(pod: dict[str, float], most: int) -> list[dict[str, float]]:
        nodes = [HEAD]

        def look() -> list[dict]:
            coordinator = get_or_create_autoscaling_coordinator()
            # What it does every 20 s of its own accord.
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True))
            asked = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
            if len(nodes) <= most and not fits(asked, nodes):
                nodes.append(pod)
            return [{"Alive": True, "Resources": node} for node in nodes]

        monkeypatch.setattr(ray, "nodes", look)
        return nodes

    return start


def fits(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    """Whether the nodes hold these bundles, which are all alike."""
    if not bundles:
        return True
    held = (min(node.get(k, 0) // v for k, v in bundles[0].items()) for node in nodes)
    return sum(held) >= len(bundles)


def test_a_cluster_that_starts_empty_brings_a_gpu_for_each_worker(autoscale):
    nodes = autoscale(GPU_POD, most=4)
    assert place(WorkerRange(3, 3), timeout=60) == 8
    assert nodes == [HEAD, GPU_POD, GPU_POD, GPU_POD]


@pytest.mark.parametrize(("pod", "cpus"), [(GPU_POD, 8), (CPU_POD, 4)])
def test_an_elastic_run_takes_its_share_of_the_first_node(pod, cpus, autoscale):
    nodes = autoscale(pod, most=4)
    assert place(WorkerRange(1, 2), timeout=60) == cpus
    assert nodes == [HEAD, pod]


def test_cores_are_shared_out_among_the_workers_that_are_of_use(autoscale):
    autoscale({"CPU": 28.0, "GPU": 7.0}, most=1)
    assert place(WorkerRange(1, 8), timeout=60) == 4
    assert place(WorkerRange(1, 8), global_batch=8) == 7


def test_a_cluster_that_does_not_grow_is_an_error_in_the_end(autoscale):
    autoscale(GPU_POD, most=1)
    with pytest.raises(ValueError, match=r"2 asked for with 1 CPU and 1 GPU.*placement_timeout"):
        place(WorkerRange(2, 2), timeout=1)
