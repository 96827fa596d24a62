"""Processes for tests, forked from one that has done the imports: those are 11 s of a core."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing

# One server forks all of a session's, so it imports what any of them needs.
MODULES = ["tests.cluster.checkpoint_ranks", "cluster.checkpoints", "tests.cluster.test_cache"]


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
