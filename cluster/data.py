"""The two data sets of a run: how they are configured, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.manifest import Manifest, open_manifest
from cluster.storage import StorageConfig
from sepico.taxonomies import CITYSCAPES_19


@dataclass
class DataConfig:
    """The two data sets, and how samples are drawn and cropped.

    Attributes:
        source: URL of the labelled source shards.
        target: URL of the target shards; their labels, if any, are never trained on.
        source_images: Size of the source set, for a dry run without its shards.
        target_images: Size of the target set, for a dry run without its shards.
        crop_height: Height of the source crop and of the class-balanced target crop, pixels.
        crop_width: Width of the source crop and of the class-balanced target crop, pixels.
        crop_max_ratio: Largest share of a source crop that one class may take, 0..1.
        crop_tries: Boxes tried for crop_max_ratio before one is taken as it is.
        flip_probability: Chance that a sample is mirrored left to right, 0..1.
        rcs_temperature: Rare class sampling: lower prefers rare classes more.
        rcs_min_pixels: Rare class sampling draws a class from images with more pixels of it.
        rcs_crop_ratio: The crop is to hold rcs_min_pixels times this of the class drawn.
        threads: Threads that decode and augment, per worker.
        prefetch: Batches prepared ahead, per worker.
        cache: Local folder that keeps whole shards for all workers of a node; empty for none.
        cache_bytes: Size the cache may take; beyond it shards idle for a minute make room.
    """

    source: str = ""
    target: str = ""
    source_images: int = 0
    target_images: int = 0
    crop_height: int = 640
    crop_width: int = 640
    crop_max_ratio: float = 0.75
    crop_tries: int = 10
    flip_probability: float = 0.5
    rcs_temperature: float = 0.01
    rcs_min_pixels: int = 3000
    rcs_crop_ratio: float = 0.5
    threads: int = 2
    prefetch: int = 4
    cache: str = ""
    cache_bytes: int = 100_000_000_000

    def __post_init__(self) -> None:
        for name in ("crop_height", "crop_width", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} {getattr(self, name)} must be at least 1")
        for name in ("crop_max_ratio", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} {getattr(self, name)} must lie in 0..1")
        for name in ("crop_tries", "rcs_min_pixels", "rcs_crop_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} {getattr(self, name)} must not be negative")
        if self.rcs_temperature <= 0:
            raise ValueError(f"data.rcs_temperature {self.rcs_temperature} must be positive")


def check_set(data: DataConfig) -> None:
    """Raise ValueError, in one line, where a data set that training needs is not named."""
    for name in ("source", "target"):
        if not getattr(data, name):
            raise ValueError(
                f"data.{name} is not set: give the URL that `python -m jobs.ingest` wrote"
            )


def check_data(
    data: DataConfig, storage: StorageConfig, global_batch: int, *, day_night: bool = False
) -> Manifest:
    """Before work starts: both stores answer and can fill a batch. Returns the source manifest.

    With `day_night` the classes must be those that its fusion knows, and the target's first
    sample must have a reference image. Raises ValueError in one line.
    """
    source, target = (open_manifest(url, storage) for url in (data.source, data.target))
    check_manifests(data, source, target, global_batch)
    if day_night:
        if source.taxonomy.names != CITYSCAPES_19.names:
            raise ValueError(
                f"teacher.day_night needs the 19 classes of Cityscapes, {source.url} has others: "
                "ingest it with --classes cityscapes19 or set teacher.day_night to false"
            )
        _check_reference(data.target, storage)
    return source


def _check_reference(url: str, storage: StorageConfig) -> None:
    """Raise what reading the first sample with its reference does."""
    from cluster.reader import open_reader  # with torch, which else the check does not need

    open_reader(url, storage, references=True).read(0)


def check_manifests(
    data: DataConfig, source: Manifest, target: Manifest, global_batch: int
) -> None:
    """Refuse data that cannot fill a batch. Raises ValueError in one line."""
    if not source.labelled:
        raise ValueError(f"data.source {source.url} has no labels: ingest it with --labels true")
    if target.labelled and target.taxonomy.names != source.taxonomy.names:
        raise ValueError(
            f"{source.url} and {target.url} have other classes: ingest both with one classes.json"
        )
    rarest = source.pixel_counts.max(axis=0)
    for name, most, total in zip(
        source.taxonomy.names, rarest, source.pixel_counts.sum(axis=0), strict=True
    ):
        if total and most <= data.rcs_min_pixels:
            raise ValueError(
                f"class {name!r}: no image of {source.url} holds more than data.rcs_min_pixels "
                f"{data.rcs_min_pixels} pixels of it (the most is {most}): lower it"
            )
    for name, manifest in (("source", source), ("target", target)):
        if len(manifest) < global_batch:
            raise ValueError(
                f"data.{name} {manifest.url} holds {len(manifest)} images, fewer than "
                f"global_batch {global_batch}: add images or lower it"
            )
        small = (manifest.heights < data.crop_height) | (manifest.widths < data.crop_width)
        if small.any():
            i = int(small.argmax())
            raise ValueError(
                f"data.{name} image {manifest.keys[i]!r} is {manifest.widths[i]}x"
                f"{manifest.heights[i]}, smaller than the crop {data.crop_width}x"
                f"{data.crop_height}: lower data.crop_width and data.crop_height or ingest "
                "with a larger --size"
            )
    largest = max(shard.size for shard in [*source.shards, *target.shards])
    if data.cache and data.cache_bytes < largest:
        raise ValueError(
            f"data.cache_bytes {data.cache_bytes} is less than a shard's {largest} bytes: raise it"
        )
    if target.image_size is None:
        raise ValueError(f"the images of {target.url} differ in size: ingest it with --size")
