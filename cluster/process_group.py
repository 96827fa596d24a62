"""Joins the workers of a Ray Train group in a process group of torch.

Ray's own configuration of it imports torch where it is unpickled: in the group's controller, which
needs none, and whose start every start of a group waits for.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

TIMEOUT = timedelta(minutes=30)  # of a collective; a step that hangs is the watchdog's


class _JoinWorkers(Backend):
    share_cuda_visible_devices = True  # NCCL needs to see the GPUs of the node's other workers

    def on_start(self, worker_group: Any, backend_config: "ProcessGroup") -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        where = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        ray.get(worker_group.execute_async(_join, backend_config.backend, where))


@dataclass
class ProcessGroup(BackendConfig):
    """Workers find a process group of this backend ("gloo", "nccl") when their function begins."""

    backend: str = "gloo"
    backend_cls = _JoinWorkers


def _join(backend: str, where: dict[str, str]) -> None:
    import torch.distributed as dist
    from ray.train.torch import get_device

    context = ray.train.get_context()
    local_rank = context.get_local_rank()
    if backend == "nccl":
        # DeepSpeed takes it for the GPU's index, which it is not where a node has GPUs 9 and 10:
        # CUDA_VISIBLE_DEVICES lists those of a node as strings, 10 before 9.
        local_rank = get_device().index
    os.environ |= where | {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    dist.init_process_group(backend, timeout=TIMEOUT)
