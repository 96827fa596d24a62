"""Processes for tests, forked from one that has done the imports: those are 11 s of a core."""

import atexit
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.multiprocessing

# Else PyTorch, asked whether there is a GPU, starts CUDA, which does not outlive a fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# One server forks all of a session's, so it imports what any of them needs.
MODULES = [
    "tests.cluster.checkpoint_ranks",
    "tests.cluster.test_cache",
    "cluster.prediction",
    "cluster.report",
    "cluster.ingest",
    "cluster.export",
    "cluster.training",
]


def fork_context() -> ForkServerContext:
    """Its processes have the imports of MODULES, and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call `function(rank, world_size, *arguments)` in `world_size` processes."""
    fork_context()
    torch.multiprocessing.start_processes(
        function, (world_size, *arguments), nprocs=world_size, start_method="forkserver"
    )


def run_module(
    module: str, arguments: list[str], *, timeout: float = 400, file_bytes: int | None = None
) -> subprocess.CompletedProcess:
    """What `python -m module arguments` answers in this process' environment.

    `file_bytes` is the largest file it may write, as on a disk that is full.
    """
    return start_module(module, arguments, timeout=timeout, file_bytes=file_bytes)()


def start_module(
    module: str, arguments: list[str], *, timeout: float = 400, file_bytes: int | None = None
) -> Callable[[], subprocess.CompletedProcess]:
    """`run_module` that has begun; calling what it returns waits for the answer."""
    folder = tempfile.TemporaryDirectory()
    outputs = [Path(folder.name, name) for name in ("stdout", "stderr")]
    process = fork_context().Process(
        target=_become, args=(module, arguments, dict(os.environ), outputs, file_bytes)
    )
    process.start()

    def finish() -> subprocess.CompletedProcess:
        with folder:
            process.join(timeout)
            stdout, stderr = (file.read_text() if file.exists() else "" for file in outputs)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired([module, *arguments], timeout, stdout, stderr)
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, stdout, stderr)

    return finish


def _become(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    outputs: list[Path],
    file_bytes: int | None,
) -> None:
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, -1))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as an interpreter does; a process of multiprocessing does not
