"""Images and label planes in files -> Arrow shards in object storage, once, before training.

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

import numpy as np
import ray
import torch
import xxhash
from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from cluster.datasets import find_sources, read_taxonomy
from cluster.layouts import find_dataset
from cluster.shards import Manifest, Shard, ShardWriter, read_manifest, write_manifest
from cluster.sources import Source, read_image, read_label
from cluster.storage import StorageConfig, StorageError, absolute_url, open_storage
from cluster.telemetry import PlainProgress
from sepico.taxonomies import Taxonomy

JPEG_QUALITY = 95


@dataclass
class IngestConfig:
    """Turns a data set as it was published, or ROOT/images and ROOT/labels, into Arrow shards.

    The names of published data sets are gtav, synthia, cityscapes, dark_zurich,
    nighttime_driving, bdd100k_night and acdc. A folder of your own holds ROOT/images/STEM.jpg or
    .png and ROOT/labels/STEM.png, 8-bit grayscale train ids; ROOT/references/STEM.jpg or .png, if
    there is such a folder, is stored as the day image of the same place. ROOT must be visible from
    every node of the Ray cluster.

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
        shard_bytes: Source bytes gathered into one shard; a task holds one shard in memory.
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
    shard_bytes: int = 64 * 2**20
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        find_dataset(self.dataset).pick_split(self.split)
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
    _inputs(config)
    open_storage(config.to, config.storage).check()


def ingest(config: IngestConfig) -> Manifest:
    """Convert on the connected Ray cluster; returns what was written.

    A failure deletes the shards this run wrote. Shards of an earlier data set at the same URL
    stay, since a running training may still read them.
    """
    check(config)
    config = replace(config, to=absolute_url(config.to))  # a task runs in another folder
    sources, taxonomy = _inputs(config)
    plan = plan_shards([source.size for source in sources], config.shard_bytes)
    storage = open_storage(config.to, config.storage)
    before = set(storage.list())
    written: dict[int, tuple[Shard, list[dict[str, Any]]]] = {}
    try:
        _convert(config, taxonomy, [sources[begin:end] for begin, end in plan], written)
        options = {
            "dataset": config.dataset,
            "split": find_dataset(config.dataset).pick_split(config.split),
            "size": config.size,
            "shard_bytes": config.shard_bytes,
        }
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
        label = None if source.label is None else _label_plane(source, taxonomy, image, size)
        reference = None
        if source.reference is not None:
            reference, reference_image = read_image(source.reference)
            _check_size(source, source.reference, reference_image, image)
            reference, _ = _resized(reference, reference_image, size)
        encoded, image = _resized(encoded, image, size)
        height_width = (image.shape[1], image.shape[2])
        writer.add(source.key, encoded, height_width, label, reference)
    return writer.finish()


def _label_plane(
    source: Source, taxonomy: Taxonomy, image: torch.Tensor, size: tuple[int, int] | None
) -> np.ndarray:
    """The (H, W) uint8 label as it is stored: in `size`, else in the size of its image."""
    label = read_label(source.label, taxonomy, source.coding)
    if not source.rescale_label:
        _check_size(source, source.label, label, image)
    height_width = size or tuple(image.shape[1:])
    if tuple(label.shape) != height_width:
        # "exact" samples at pixel centres, as the image's filter does.
        label = resize(label[None], list(height_width), InterpolationMode.NEAREST_EXACT)[0]
    return label.numpy()


def _resized(
    encoded: bytes, image: torch.Tensor, size: tuple[int, int] | None
) -> tuple[bytes, torch.Tensor]:
    """The image in `size` and its bytes: the file's own if it has that size already."""
    if size is None or tuple(image.shape[1:]) == size:
        return encoded, image
    image = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return encode_jpeg(image, JPEG_QUALITY).numpy().tobytes(), image


def _check_size(source: Source, path: Path, plane: torch.Tensor, image: torch.Tensor) -> None:
    if plane.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"{path} is {_size(plane)} but its image {source.image} is {_size(image)}: "
            "they must be the same size"
        )


def _inputs(config: IngestConfig) -> tuple[list[Source], Taxonomy]:
    root, dataset = Path(config.root).absolute(), find_dataset(config.dataset)
    sources = find_sources(root, dataset, config.split, config.list, config.labels)
    return sources, read_taxonomy(root, dataset, config.classes)


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
