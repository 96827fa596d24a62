"""The values in a run's checkpoints: vectors from the parts of all ranks, weights by name."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from safetensors.torch import load
from torch import Tensor

from cluster.checkpoint_format import READERS, Checkpoint, read_content
from cluster.storage import Storage

# The file that holds a vector, by the vector's name.
FILE_OF = {
    "student": "student",
    "teacher": "teacher",
    "exp_avg": "optimizer",
    "exp_avg_sq": "optimizer",
}


def read_file(storage: Storage, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of one file; DamagedCheckpointError names it when it is missing or damaged."""
    return load(read_content(storage, checkpoint, name))


def read_runs(
    storage: Storage, checkpoint: Checkpoint, vector: str, runs: list[tuple[int, int]]
) -> list[Tensor]:
    """The values of runs of a vector, each 1-D float32, from the files that hold a part of them."""
    results = [torch.empty(count) for _, count in runs]

    def copy(name: str) -> int:
        overlaps = list(_overlaps(runs, checkpoint.runs[name]))
        if overlaps:
            values = read_file(storage, checkpoint, name)[vector]
            for i, to, place, count in overlaps:
                results[i][to : to + count] = values[place : place + count]
        return sum(count for *_, count in overlaps)

    names = [name for name in checkpoint.runs if name.startswith(f"{FILE_OF[vector]}-")]
    with ThreadPoolExecutor(READERS) as pool:
        copied = sum(pool.map(copy, names))
    if copied != sum(count for _, count in runs):
        raise ValueError(f"{storage.url}/{checkpoint.prefix} holds only a part of {vector}")
    return results


def _overlaps(
    wanted: list[tuple[int, int]], stored: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int, int]]:
    """(index of a wanted run, offset in it, offset in the file, elements); `stored` is sorted."""
    starts = [start for start, _ in stored]
    places = list(accumulate((count for _, count in stored), initial=0))
    for i, (start, count) in enumerate(wanted):
        at = max(bisect_right(starts, start) - 1, 0)
        while at < len(stored) and starts[at] < start + count:
            first, last = max(start, starts[at]), min(start + count, starts[at] + stored[at][1])
            if first < last:
                yield i, first - start, places[at] + first - starts[at], last - first
            at += 1


def read_weights(storage: Storage, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Whole float32 weights and buffers of "student" or "teacher", by parameter name."""
    sizes = [math.prod(shape) for shape in checkpoint.shapes.values()]
    (vector,) = read_runs(storage, checkpoint, name, [(0, sum(sizes))])
    weights = {
        parameter: value.view(shape)
        for (parameter, shape), value in zip(
            checkpoint.shapes.items(), vector.split(sizes), strict=True
        )
    }
    return weights | read_buffers(storage, checkpoint, name)


def read_buffers(storage: Storage, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Buffers of "student" or "teacher", or the tensors of "statistics"."""
    stored = read_file(storage, checkpoint, "buffers.safetensors")
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
