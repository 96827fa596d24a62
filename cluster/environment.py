"""What a run ran on: versions and hardware, for its report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

ENVIRONMENT = "environment.json"
_PACKAGES = ("sepico-cluster", "torch", "torchvision", "ray", "deepspeed", "pyarrow", "numpy")


def describe_environment(device: torch.device, workers: int, cpus: int) -> dict[str, Any]:
    """Of a worker of `workers` with `cpus` cores each."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "workers": workers,
        "cpus_per_worker": cpus,
        "gpu": gpu,
        "processor": _processor(),
        "cores_of_node": os.cpu_count(),
        "memory_bytes_of_node": psutil.virtual_memory().total,
        "system": platform.platform(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the code of a job's working directory is not installed
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model n"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()
