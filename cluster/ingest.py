"""Folder of images and label planes -> Arrow shards in object storage, once, before training.

Shard boundaries depend on the sorted keys and the sizes of the source files alone, and every
shard is built by one task from its own files. So the bytes written are the same for one core and
for a hundred, and two runs can be compared by checksum. The folder must be visible under the
same path from every node (a shared file system, or a cluster of one node).
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
import xxhash
from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from cluster.folder import Source, find_sources, read_image, read_label, read_taxonomy
from cluster.shards import Manifest, Shard, ShardWriter, read_manifest, write_manifest
from cluster.storage import StorageConfig, StorageError, absolute_url, open_storage
from cluster.telemetry import PlainProgress
from sepico.taxonomies import Taxonomy

JPEG_QUALITY = 95


@dataclass
class IngestConfig:
    """Turns ROOT/images and ROOT/labels into Arrow shards.

    Images are ROOT/images/STEM.jpg or .png, labels ROOT/labels/STEM.png: 8-bit grayscale train
    ids. The folder must be visible from every node of the Ray cluster.

    Attributes:
        root: Folder that holds images/ and labels/.
        to: Where the shards go: s3://BUCKET/PREFIX or a folder.
        list: File with one STEM a line, below ROOT or an absolute path; default: every image.
        classes: File with the classes' names and colours; default: classes.json in ROOT or above.
        labels: Store the labels; false for a target domain that has none.
        size: WIDTHxHEIGHT in pixels to resize to; default: images keep their size and their bytes.
        shard_bytes: Source bytes gathered into one shard; a task holds one shard in memory.
        storage: How object storage is reached.
    """

    root: str
    to: str
    list: str | None = None
    classes: str | None = None
    labels: bool = True
    size: str | None = None
    shard_bytes: int = 64 * 2**20
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.size is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size):
            raise ValueError(f"size {self.size!r} must be WIDTHxHEIGHT, such as 1280x720")
        if self.shard_bytes <= 0:
            raise ValueError(f"shard_bytes {self.shard_bytes} must be positive")

    @property
    def height_width(self) -> tuple[int, int] | None:
        if self.size is None:
            return None
        width, height = self.size.split("x")
        return int(height), int(width)


def check(config: IngestConfig) -> None:
    """Everything that can be known before work starts. Raises ValueError in one line."""
    find_sources(Path(config.root), config.list, config.labels)
    read_taxonomy(Path(config.root), config.classes)
    open_storage(config.to, config.storage).check()


def ingest(config: IngestConfig) -> Manifest:
    """Convert on the connected Ray cluster; returns what was written.

    A failure deletes the shards this run wrote. Shards of an earlier data set at the same URL
    stay, since a running training may still read them.
    """
    check(config)
    root = Path(config.root).absolute()
    config = replace(config, to=absolute_url(config.to))  # a task runs in another folder
    taxonomy = read_taxonomy(root, config.classes)
    sources = find_sources(root, config.list, config.labels)
    plan = plan_shards([source.size for source in sources], config.shard_bytes)
    storage = open_storage(config.to, config.storage)
    before = set(storage.list())
    written: dict[int, tuple[Shard, list[dict[str, Any]]]] = {}
    try:
        _convert(config, taxonomy, [sources[begin:end] for begin, end in plan], written)
        options = {"size": config.size, "shard_bytes": config.shard_bytes}
        shards = [written[i] for i in range(len(plan))]
        write_manifest(storage, taxonomy, shards, labelled=config.labels, options=options)
    except BaseException:
        for shard, _ in written.values():
            # The first error is the one to report, whatever a broken store answers now.
            with suppress(StorageError):
                if shard.name not in before:
                    storage.delete(shard.name)
        raise
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


def build_shard(
    sources: list[Source], taxonomy: Taxonomy, size: tuple[int, int] | None
) -> tuple[bytes, list[dict[str, Any]]]:
    """One shard's bytes and manifest rows. Raises ValueError that names the bad file."""
    writer = ShardWriter(taxonomy)
    for source in sources:
        encoded, image = read_image(source.image)
        label = None
        if source.label is not None:
            label = read_label(source.label, taxonomy)
            if label.shape != image.shape[1:]:
                raise ValueError(
                    f"{source.label} is {_size(label)} but its image {source.image} is "
                    f"{_size(image)}: they must be the same size"
                )
        if size is not None and tuple(image.shape[1:]) != size:
            image = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
            encoded = encode_jpeg(image, JPEG_QUALITY).numpy().tobytes()
            if label is not None:
                # "exact" samples at pixel centres, as the image's filter does.
                label = resize(label[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
        plane = None if label is None else label.numpy()
        writer.add(source.key, encoded, (image.shape[1], image.shape[2]), plane)
    return writer.finish()


@ray.remote(num_cpus=1)
def _shard_task(
    index: int, sources: list[Source], taxonomy: Taxonomy, config: IngestConfig
) -> tuple[int, Shard, list[dict[str, Any]]]:
    torch.set_num_threads(1)  # one task a core
    data, rows = build_shard(sources, taxonomy, config.height_width)
    checksum = xxhash.xxh3_64_intdigest(data)
    shard = Shard(f"shard-{index:05d}-{checksum:016x}.arrow", len(data), checksum)
    open_storage(config.to, config.storage).put(shard.name, data)
    return index, shard, rows


def _convert(
    config: IngestConfig,
    taxonomy: Taxonomy,
    groups: list[list[Source]],
    written: dict[int, tuple[Shard, list[dict[str, Any]]]],
) -> None:
    """Run a task a group, at most two a core at a time; fill `written` with every shard put.

    After a failure no task is started, but those under way are awaited, so that `written` names
    everything there is to clean up.
    """
    waiting = list(enumerate(groups))[::-1]
    running: list[ray.ObjectRef] = []
    failure: BaseException | None = None
    with _progress(total=sum(len(group) for group in groups)) as progress:
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < 2 * _cores():
                running.append(_shard_task.remote(*waiting.pop(), taxonomy, config))
            try:
                done, running = ray.wait(running)
                index, shard, rows = ray.get(done[0])
                written[index] = shard, rows
                progress.update(len(rows))
            except (ray.exceptions.RayError, KeyboardInterrupt) as error:
                failure = failure or getattr(error, "cause", None) or error
    if failure is not None:
        raise failure


def _cores() -> int:
    """Asked again for every task: an autoscaled cluster grows while it works."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _progress(total: int) -> tqdm:
    """A bar on a terminal, a line now and then in a log."""
    bar = tqdm if sys.stderr.isatty() else PlainProgress
    return bar(total=total, desc="ingest", unit="image")


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
