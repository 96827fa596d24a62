"""Synchronised batch-norm of two CPU workers beside PyTorch's own parts that it does without.

    python tests/benchmarks/batch_norm.py [--repeats 200]

Moments of a layer (var_mean against two passes) and their sum over workers (gloo's all-reduce
against sockets between the ranks), in turn, in one run; a ratio above 1 is a gain. "busy": each
worker computes for about a millisecond between two sums, as a layer does.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sepico.normalization import _moments
from sepico.rank_sum import RankSum

SHAPES = [(4, 16, 48, 48), (4, 96, 12, 12), (2, 256, 80, 80)]
CHANNELS = [16, 256, 1024]


def measure(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call."""
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - began) / repeats


def show(name: str, plain: float, own: float) -> None:
    print(f"{name:<34}{plain:>9.3f}{own:>9.3f}{plain / own:>8.1f} x", flush=True)


def run_rank(rank: int, rendezvous: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    if rank == 0:
        print(f"{'':<34}{'PyTorch':>9}{'ours':>9}   ms")
    for shape in SHAPES:
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        plain = measure(lambda x=x: torch.var_mean(x, (0, 2, 3), correction=0), repeats)
        own = measure(lambda x=x: _moments(x), repeats)
        dist.barrier()
        if rank == 0:
            show(f"moments {shape}", plain, own)
    sum_over_ranks = RankSum()
    convolution = torch.nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    image = torch.randn(4, 32, 24, 24)
    compute = measure(lambda: convolution(image), repeats)
    for channels in CHANNELS:
        x = torch.zeros(2 * channels + 1, dtype=torch.float64)
        plain = measure(lambda x=x: dist.all_reduce(x), repeats)
        own = measure(lambda x=x: sum_over_ranks(x), repeats)
        if rank == 0:
            show(f"sum over workers, {channels} channels", plain, own)
        plain = measure(lambda x=x: (convolution(image), dist.all_reduce(x)), repeats) - compute
        own = measure(lambda x=x: (convolution(image), sum_over_ranks(x)), repeats) - compute
        if rank == 0:
            show(f"busy, {channels} channels", plain, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 2 workers")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            run_rank, (f"file://{folder}/rendezvous", repeats), nprocs=2, start_method="spawn"
        )


if __name__ == "__main__":
    main()
