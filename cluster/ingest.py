"""Images and label planes in files -> Arrow shards in object storage, once, before training.

Shard boundaries depend on the sorted keys and on the files alone, and every shard is built by one
task from its own files. So the bytes written are the same for one core and for a hundred, and two
runs can be compared by checksum. The folder must be visible under the same path from every node
(a shared file system, or a cluster of one node).

A shard's name carries the digests of its inputs and of its bytes. An ingest that was interrupted
and is started again finds the shards of unchanged inputs by their names, reads them back, and
builds the others. It ends with the manifest, and then removes what neither this manifest nor the
one that it replaced names. A lease keeps a second ingest to the same place out until then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import ray
import torch
import xxhash

from cluster.conversion import build_shard, inputs_digest, stored_sizes
from cluster.datasets import find_sources, read_taxonomy
from cluster.layouts import find_dataset
from cluster.lease import Lease, hold_lease
from cluster.manifest import (
    MANIFEST,
    Manifest,
    UnreadableManifestError,
    read_manifest,
    write_manifest,
)
from cluster.ray_tasks import progress_bar, run_tasks
from cluster.shards import Shard, shard_rows
from cluster.sources import Source
from cluster.storage import MissingObjectError, Storage, StorageConfig, StorageError, open_storage
from cluster.urls import absolute_url
from sepico.config import height_width
from sepico.taxonomies import Taxonomy

SHARD_NAME = re.compile(r"shard-(?P<index>\d+)-[^/]+\.arrow")
WRITTEN = re.compile(rf"{SHARD_NAME.pattern}|{re.escape(MANIFEST)}")


@dataclass
class IngestConfig:
    """Turns a data set as it was published, or ROOT/images and ROOT/labels, into Arrow shards.

    The names of published data sets are gtav, synthia, cityscapes, dark_zurich,
    nighttime_driving, bdd100k_night and acdc. A folder of your own holds ROOT/images/STEM.jpg or
    .png and ROOT/labels/STEM.png, 8-bit grayscale train ids; ROOT/references/STEM.jpg or .png, if
    there is such a folder, is stored as the day image of the same place. ROOT must be visible from
    every node of the Ray cluster. `python -m jobs.ingest verify URL` reads back what was written.

    Attributes:
        root: Folder that the data set's archives were unpacked into.
        to: Where the shards go: s3://BUCKET/PREFIX or a folder.
        dataset: Layout of ROOT: folder for one of your own, or a published data set's name.
        split: train, val or test, as far as the data set has it; default: the first it has.
        list: File with one STEM a line, below ROOT or an absolute path; default: every image.
        classes: cityscapes19, cityscapes16 or cityscapes13, or a file with the classes' names and
            colours; default: the data set's own, for a folder classes.json in ROOT or above.
        labels: Store the labels; false for a target domain that has none.
        size: WIDTHxHEIGHT in pixels to resize to; default: images keep their size and their bytes.
        shard_bytes: Size of a shard to aim for, bytes; a task holds one shard in memory.
        storage: How object storage is reached.
    """

    root: str
    to: str
    dataset: str = "folder"
    split: str | None = None
    list: str | None = None
    classes: str | None = None
    labels: bool = True
    size: str | None = None
    shard_bytes: int = 128 * 2**20
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        find_dataset(self.dataset).pick_split(self.split)
        height_width("size", self.size)
        if self.shard_bytes <= 0:
            raise ValueError(f"shard_bytes {self.shard_bytes} must be positive")

    @property
    def height_width(self) -> tuple[int, int] | None:
        return height_width("size", self.size)


def check(config: IngestConfig) -> None:
    """Everything that can be known before work starts. Raises ValueError in one line."""
    _inputs(config)
    open_storage(config.to, config.storage).check()


def ingest(config: IngestConfig) -> Manifest:
    """Convert on the connected Ray cluster; returns what was written.

    Raises ValueError for bad data; the shards that were finished stay, and the same call goes on
    from them. Shards of an earlier data set at the same URL stay too, until the ingest after the
    one that replaces it, since a running training may still read them.
    """
    check(config)
    config = replace(config, to=absolute_url(config.to))  # a task runs in another folder
    sources, taxonomy = _inputs(config)
    sizes = stored_sizes(sources, taxonomy, config.height_width)
    groups = [sources[begin:end] for begin, end in plan_shards(sizes, config.shard_bytes)]
    storage = open_storage(config.to, config.storage)
    with _only_writer(storage) as lease:
        replaced = _named_shards(storage)
        shards = _convert(config, taxonomy, groups, storage.list())
        options = {
            "dataset": config.dataset,
            "split": find_dataset(config.dataset).pick_split(config.split),
            "size": config.size,
            "shard_bytes": config.shard_bytes,
        }
        lease.renew(storage)
        write_manifest(storage, taxonomy, shards, labelled=config.labels, options=options)
        named = replaced | {shard.name for shard, _ in shards}
        for name in storage.list():
            if SHARD_NAME.fullmatch(name) and name not in named:
                storage.delete(name)
        storage.delete_unfinished(WRITTEN)
    return read_manifest(storage)


def plan_shards(sizes: list[int], shard_bytes: int) -> list[tuple[int, int]]:
    """Cut samples 0..N into runs (begin, end) that end once they reach `shard_bytes`."""
    plan, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= shard_bytes or i == len(sizes) - 1:
            plan.append((begin, i + 1))
            begin, total = i + 1, 0
    return plan


def _inputs(config: IngestConfig) -> tuple[list[Source], Taxonomy]:
    root, dataset = Path(config.root).absolute(), find_dataset(config.dataset)
    sources = find_sources(root, dataset, config.split, config.list, config.labels)
    return sources, read_taxonomy(root, dataset, config.classes)


@contextmanager
def _only_writer(storage: Storage) -> Iterator[Lease]:
    """Hold the lease of a data set's place, and leave no trace of it. Raises LeaseError."""
    lease = None
    try:
        with hold_lease(storage) as lease:
            yield lease
    finally:
        if lease is not None:
            # An error is the one to report, whatever a broken store answers now.
            with suppress(StorageError):
                storage.delete(lease.key)


def _named_shards(storage: Storage) -> set[str]:
    """The shards of the data set that is there already."""
    if not storage.exists(MANIFEST):
        return set()
    try:
        return {shard.name for shard in read_manifest(storage).shards}
    except UnreadableManifestError:
        return set()


def _convert(
    config: IngestConfig, taxonomy: Taxonomy, groups: list[list[Source]], names: list[str]
) -> list[tuple[Shard, pa.Table]]:
    """The shard of every group and its rows; `names` are the objects that are there already."""
    there: dict[int, list[str]] = {}
    for name in names:
        if match := SHARD_NAME.fullmatch(name):
            there.setdefault(int(match["index"]), []).append(name)
    calls = ((i, group, taxonomy, config, there.get(i, [])) for i, group in enumerate(groups))
    shards: dict[int, tuple[Shard, pa.Table]] = {}
    with progress_bar("ingest", sum(len(group) for group in groups)) as progress:
        for index, shard, rows in run_tasks(_shard_task, calls):
            shards[index] = shard, rows
            progress.update(len(rows))
    kept = sum(shard.name in there.get(index, []) for index, (shard, _) in shards.items())
    if kept:
        print(f"{kept} of {len(groups)} shards were there already", file=sys.stderr)
    return [shards[index] for index in range(len(groups))]


@ray.remote(num_cpus=1)
def _shard_task(
    index: int,
    sources: Sequence[Source],
    taxonomy: Taxonomy,
    config: IngestConfig,
    there: list[str],
) -> tuple[int, Shard, pa.Table]:
    """Shard `index`, taken from one of the objects `there` if it was made of the same inputs."""
    torch.set_num_threads(1)  # one task a core
    storage = open_storage(config.to, config.storage)
    prefix = f"shard-{index:05d}-{inputs_digest(sources, taxonomy, config.height_width)}"
    for name in there:
        if name.startswith(prefix) and (found := _read_back(storage, name, taxonomy)):
            return index, *found
    data, rows = build_shard(sources, taxonomy, config.height_width)
    checksum = xxhash.xxh3_64_intdigest(data)
    shard = Shard(f"{prefix}-{checksum:016x}.arrow", data.size, checksum)
    storage.put(shard.name, data)
    return index, shard, rows


def _read_back(storage: Storage, name: str, taxonomy: Taxonomy) -> tuple[Shard, pa.Table] | None:
    """A finished shard and its rows; None if its bytes are not those that it was named after."""
    try:
        data = pa.py_buffer(storage.get(name))
    except MissingObjectError:
        return None
    checksum = xxhash.xxh3_64_intdigest(data)
    if not name.endswith(f"-{checksum:016x}.arrow"):
        return None
    return Shard(name, data.size, checksum), shard_rows(data, taxonomy.num_classes)
