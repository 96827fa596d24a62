"""Reads a whole data set back and compares every sample's byte range with its checksum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray
import xxhash

from cluster.manifest import Manifest, open_manifest
from cluster.ranges import read_again
from cluster.ray_tasks import progress_bar, run_tasks
from cluster.shards import Shard
from cluster.storage import MissingObjectError, Storage, StorageConfig, open_storage
from cluster.urls import absolute_url

# A byte that flipped on the way here is intact at the second reading.
READINGS = 2


@dataclass
class VerifyConfig:
    """Compares every sample of a data set with its checksum; the exit code is 1 if one differs.

    Attributes:
        url: The data set: what `python -m jobs.ingest --to` was given.
        storage: How object storage is reached.
    """

    url: str
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class Damage:
    """What is wrong with the sample, or with a shard outside its samples, that `name` names."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Samples:
    """Where the samples of one shard lie, and the xxh3 of their bytes."""

    offsets: np.ndarray  # (n,) int64, bytes
    lengths: np.ndarray  # (n,) uint32, bytes
    checksums: np.ndarray  # (n,) uint64


def find(config: VerifyConfig) -> Manifest:
    """The data set, before work starts. Raises StorageError in one line if there is none."""
    return open_manifest(config.url, config.storage)


def verify(config: VerifyConfig) -> tuple[Manifest, list[Damage]]:
    """Read all shards on the connected Ray cluster, a task each; the damage comes in key order.

    Raises StorageError as `find` does, and where a shard that is there cannot be read.
    """
    manifest = find(config)
    url = absolute_url(config.url)  # a task runs in another folder
    found: list[tuple[int, Damage]] = []
    calls = (
        (url, config.storage, begin, shard, samples) for begin, shard, samples in _shards(manifest)
    )
    with progress_bar("verify", len(manifest)) as progress:
        for begin, count, damaged, outside in run_tasks(_verify_task, calls):
            for place, reason in damaged:
                found.append((begin + place, Damage(manifest.keys[begin + place], reason)))
            if outside is not None:
                found.append((begin, outside))
            progress.update(count)
    return manifest, [damage for _, damage in sorted(found, key=lambda entry: entry[0])]


def _shards(manifest: Manifest) -> Iterator[tuple[int, Shard, _Samples]]:
    """Every shard, its samples, and the place of the first one among all."""
    bounds = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1))
    for shard, begin, end in zip(manifest.shards, bounds[:-1], bounds[1:], strict=True):
        own = slice(int(begin), int(end))
        places = manifest.offsets[own], manifest.lengths[own], manifest.checksums[own]
        yield int(begin), shard, _Samples(*places)


@ray.remote(num_cpus=1)
def _verify_task(
    url: str, config: StorageConfig, begin: int, shard: Shard, samples: _Samples
) -> tuple[int, int, list[tuple[int, str]], Damage | None]:
    damaged, outside = examine(open_storage(url, config), shard, samples)
    return begin, len(samples.offsets), damaged, outside


def examine(
    storage: Storage, shard: Shard, samples: _Samples
) -> tuple[list[tuple[int, str]], Damage | None]:
    """The damaged samples of a shard, by place, and what is wrong with it outside of them.

    Raises StorageError where it is there and cannot be read.
    """
    for _ in range(READINGS):
        damaged, outside = _compare(storage, shard, samples)
        if not damaged and outside is None:
            break
    return damaged, outside


def _compare(
    storage: Storage, shard: Shard, samples: _Samples
) -> tuple[list[tuple[int, str]], Damage | None]:
    """What one reading of the shard finds."""
    try:
        data = pa.py_buffer(read_again(lambda: storage.get(shard.name), time.sleep))
    except MissingObjectError as error:
        return [(i, str(error)) for i in range(len(samples.offsets))], None
    damaged = []
    for i, (offset, length, checksum) in enumerate(
        zip(
            samples.offsets.tolist(),
            samples.lengths.tolist(),
            samples.checksums.tolist(),
            strict=True,
        )
    ):
        if offset + length > data.size:
            damaged.append((i, f"{shard.name} ends before byte {offset + length}"))
        elif xxhash.xxh3_64_intdigest(data.slice(offset, length)) != checksum:
            damaged.append((i, f"{shard.name}: bytes {offset}+{length} fail their checksum"))
    intact = xxhash.xxh3_64_intdigest(data) == shard.checksum
    if damaged or intact:
        return damaged, None
    return [], Damage(shard.name, "its bytes outside the samples differ from what was written")
