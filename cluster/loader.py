"""Batches for one worker: many range requests in flight, decoding off the main thread, in order.

Two pools work ahead of the consumer: one only waits for bytes, one decodes and augments (torch
and the store's client both release the GIL, so no sample crosses a process boundary). Batches
are delivered strictly by step, whatever finishes first, and everything random in them comes from
the position of its slot: see `cluster.sampling`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch

from cluster.crops import maybe_flip, rare_class_crop
from cluster.sampling import Draw, Sampler
from cluster.shards import Manifest, Sample, ShardReader, read_manifest
from cluster.storage import StorageConfig, open_storage
from sepico.randomness import slot_generator
from sepico.taxonomies import CITYSCAPES_19

# Threads that wait for object storage: enough to hide its latency, and they cost no CPU.
REQUESTS_IN_FLIGHT = 16
READ_AHEAD = 8  # samples


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


@dataclass
class Batch:
    """The slots of one step that one rank takes: b = global_batch / world_size samples."""

    step: int
    slots: list[int]
    seeds: list[int]  # Draw.seed of each slot: addresses what the step itself draws
    source_keys: list[str]
    target_keys: list[str]
    source_image: torch.Tensor  # (b, 3, crop_height, crop_width) uint8
    source_label: torch.Tensor  # (b, 1, crop_height, crop_width) int64
    target_image: torch.Tensor  # (b, 3, H, W) uint8, the whole image
    target_label: torch.Tensor | None  # (b, 1, H, W) int64, for analysis only
    target_reference: torch.Tensor | None  # (b, 3, H, W) uint8, the day image of the same place


class TrainLoader:
    """Yields `Batch` for step = start_step, start_step + 1, ... without end.

    `references` asks for the target's reference images.
    Raises ValueError, in one line, for data that cannot fill such batches; a sample that cannot
    be read is an error with its key when its batch is due.
    """

    def __init__(
        self,
        data: DataConfig,
        storage: StorageConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        references: bool = False,
    ) -> None:
        self.source, self._source_reader = _open("source", data.source, storage)
        self.target, self._target_reader = _open("target", data.target, storage, references)
        _check(data, self.source, self.target, global_batch)
        self.wait_seconds = 0.0
        self._data = data
        self._step = start_step
        self._slots = range(rank, global_batch, world_size)
        self._sampler = Sampler(
            self.source.pixel_counts,
            len(self.target),
            seed=seed,
            global_batch=global_batch,
            temperature=data.rcs_temperature,
            min_pixels=data.rcs_min_pixels,
        )
        self._fetchers = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="fetch")
        self._decoders = ThreadPoolExecutor(data.threads, thread_name_prefix="decode")
        self._ahead: deque[tuple[int, list[tuple[Draw, Future]]]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._ahead) < self._data.prefetch:
                self._ahead.append((self._step, [self._submit(s) for s in self._slots]))
                self._step += 1
            step, pending = self._ahead.popleft()
            begin = time.perf_counter()
            pairs = [future.result() for _, future in pending]
            self.wait_seconds += time.perf_counter() - begin
            seeds = [draw.seed for draw, _ in pending]
            yield _collate(step, list(self._slots), seeds, pairs, self.source.taxonomy.ignore_index)

    def close(self) -> None:
        """Drop what was prepared ahead; returns when no thread is left."""
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        # A decoder may wait for a request that was just cancelled: that ends it too.
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=True)
        self._ahead.clear()

    def _submit(self, slot: int) -> tuple[Draw, Future]:
        draw = self._sampler.draw(self._step, slot)
        source = self._fetchers.submit(self._source_reader.fetch, draw.source)
        target = self._fetchers.submit(self._target_reader.fetch, draw.target)
        return draw, self._decoders.submit(self._prepare, draw, source, target)

    def _prepare(self, draw: Draw, source: Future, target: Future) -> tuple[Sample, Sample]:
        return (
            self._prepare_source(draw, self._source_reader.decode(draw.source, source.result())),
            self._prepare_target(draw, self._target_reader.decode(draw.target, target.result())),
        )

    def _prepare_source(self, draw: Draw, sample: Sample) -> Sample:
        data = self._data
        generator = slot_generator(draw.seed, "source crop")
        y1, y2, x1, x2 = rare_class_crop(
            sample.label.numpy(),
            (data.crop_height, data.crop_width),
            generator,
            rare_class=draw.rare_class,
            min_pixels=data.rcs_min_pixels * data.rcs_crop_ratio,
            max_ratio=data.crop_max_ratio,
            tries=data.crop_tries,
            ignore_index=self.source.taxonomy.ignore_index,
        )
        image, label = sample.image[:, y1:y2, x1:x2], sample.label[y1:y2, x1:x2]
        return Sample(sample.key, *maybe_flip(generator, data.flip_probability, image, label))

    def _prepare_target(self, draw: Draw, sample: Sample) -> Sample:
        generator = slot_generator(draw.seed, "target flip")
        planes = sample.image, sample.label, sample.reference
        return Sample(sample.key, *maybe_flip(generator, self._data.flip_probability, *planes))


def load_samples(reader: ShardReader, indices: Iterable[int], threads: int = 2) -> Iterator[Sample]:
    """The samples at `indices`, in order, read ahead by `threads`; for evaluation."""
    waiting = iter(indices)
    ahead: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        while True:
            for index in islice(waiting, READ_AHEAD - len(ahead)):
                ahead.append(pool.submit(reader.read, index))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_data(
    data: DataConfig, storage: StorageConfig, global_batch: int, *, day_night: bool = False
) -> Manifest:
    """Before work starts: both stores answer and can fill a batch. Returns the source manifest.

    With `day_night` the classes must be those that its fusion knows, and the target's first
    sample must have a reference image. Raises ValueError in one line.
    """
    for url in filter(None, (data.source, data.target)):
        open_storage(url, storage).check()
    source, _ = _open("source", data.source, storage)
    target, reader = _open("target", data.target, storage, references=day_night)
    _check(data, source, target, global_batch)
    if day_night:
        if source.taxonomy.names != CITYSCAPES_19.names:
            raise ValueError(
                f"teacher.day_night needs the 19 classes of Cityscapes, {source.url} has others: "
                "ingest it with --classes cityscapes19 or set teacher.day_night to false"
            )
        reader.read(0)
    return source


def _open(
    name: str, url: str, config: StorageConfig, references: bool = False
) -> tuple[Manifest, ShardReader]:
    if not url:
        raise ValueError(f"data.{name} is not set: give the URL that `python -m jobs.ingest` wrote")
    storage = open_storage(url, config)
    manifest = read_manifest(storage)
    return manifest, ShardReader(storage, manifest, references=references)


def _check(data: DataConfig, source: Manifest, target: Manifest, global_batch: int) -> None:
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
    if target.image_size is None:
        raise ValueError(f"the images of {target.url} differ in size: ingest it with --size")


def _collate(
    step: int,
    slots: list[int],
    seeds: list[int],
    pairs: list[tuple[Sample, Sample]],
    ignore_index: int,
) -> Batch:
    def labels(samples: tuple[Sample, ...]) -> torch.Tensor:
        # The method ignores 255, whatever the data set's own value is.
        planes = torch.stack([sample.label for sample in samples]).long()[:, None]
        return planes.masked_fill_(planes == ignore_index, 255)

    sources, targets = zip(*pairs, strict=True)
    labelled = all(target.label is not None for target in targets)
    referenced = all(target.reference is not None for target in targets)
    return Batch(
        step=step,
        slots=slots,
        seeds=seeds,
        source_keys=[sample.key for sample in sources],
        target_keys=[sample.key for sample in targets],
        source_image=torch.stack([sample.image for sample in sources]),
        source_label=labels(sources),
        target_image=torch.stack([sample.image for sample in targets]),
        target_label=labels(targets) if labelled else None,
        target_reference=torch.stack([t.reference for t in targets]) if referenced else None,
    )
