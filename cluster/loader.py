"""Batches for one worker, prepared ahead and delivered strictly by step.

Whatever finishes first, everything random in a batch comes from the position of its slot: see
`cluster.sampling`. Reading ahead is `cluster.prefetch`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import pyarrow as pa
import torch

from cluster.cache import ShardCache
from cluster.crops import maybe_flip, rare_class_crop
from cluster.data import DataConfig, check_manifests
from cluster.prefetch import Prefetcher, Work
from cluster.ranges import ReadCounters
from cluster.read_metrics import ReadMetrics
from cluster.reader import Sample, ShardReader, open_reader
from cluster.sampling import Draw, Sampler
from cluster.storage import StorageConfig
from sepico.batch import StepBatch
from sepico.randomness import slot_generator

DECODERS, READ_AHEAD = 2, 8  # threads, and samples decoded ahead, of an evaluation


@dataclass
class Batch:
    """The slots rank, rank + world_size, ... of one step, which one rank takes: b samples.

    Where the number of ranks does not divide the global batch, the first ones have one more. All
    of the target's is None, and its keys are empty, where the loader reads no targets.
    """

    step: int
    slots: list[int]
    seeds: list[int]  # Draw.seed of each slot: addresses what the step itself draws
    source_keys: list[str]
    target_keys: list[str]
    source_image: torch.Tensor  # (b, 3, crop_height, crop_width) uint8
    source_label: torch.Tensor  # (b, 1, crop_height, crop_width) int64
    target_image: torch.Tensor | None  # (b, 3, H, W) uint8, the whole image
    target_label: torch.Tensor | None  # (b, 1, H, W) int64, for analysis only
    target_reference: torch.Tensor | None  # (b, 3, H, W) uint8, the day image of the same place

    @property
    def samples(self) -> list[str]:
        """What each slot is made of, for a message."""
        if not self.target_keys:
            return self.source_keys
        pairs = zip(self.source_keys, self.target_keys, strict=True)
        return [f"{source} with {target}" for source, target in pairs]

    def to(self, device: torch.device) -> StepBatch:
        """What a step takes, on `device`."""

        def image(pixels: torch.Tensor | None) -> torch.Tensor | None:
            if pixels is None:
                return None
            return pixels.to(device, non_blocking=True).float() / 255

        def label(pixels: torch.Tensor | None) -> torch.Tensor | None:
            return None if pixels is None else pixels.to(device, non_blocking=True)

        return StepBatch(
            self.seeds,
            image(self.source_image),
            label(self.source_label),
            image(self.target_image),
            label(self.target_label),
            image(self.target_reference),
        )


Prepared = tuple[Draw, Sample, Sample | None]  # of one slot: the source's crop, the whole target


class TrainLoader:
    """Yields `Batch` for step = start_step, start_step + 1, ... without end.

    Iterated again, it goes on with the step after the last one.

    `references` asks for the target's reference images; without `targets` no image of the target
    is read, and the source's are the same. `warn` is called, from any thread, with why the cache
    cannot be used. Raises ValueError, in one line, for data that cannot fill such batches; a sample
    that cannot be read is an error with its key when its batch is due.
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
        targets: bool = True,
        references: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        counters = ReadCounters()
        self._cache = ShardCache(data.cache, data.cache_bytes, warn) if data.cache else None
        options = {"cache": self._cache, "counters": counters}
        self._source = open_reader(data.source, storage, **options)
        self._target = open_reader(data.target, storage, references=references, **options)
        self.source, self.target = self._source.manifest, self._target.manifest
        check_manifests(data, self.source, self.target, global_batch)
        self._data, self._targets = data, targets
        self._steps = count(start_step)
        self._slots = range(rank, global_batch, world_size)
        self._sampler = Sampler(
            self.source.pixel_counts,
            len(self.target),
            seed=seed,
            global_batch=global_batch,
            temperature=data.rcs_temperature,
            min_pixels=data.rcs_min_pixels,
        )
        ahead = data.prefetch * len(self._slots)
        works = self._works(start_step)
        self._prefetcher = Prefetcher(works, threads=data.threads, ahead=ahead)
        self.metrics = ReadMetrics(counters)

    def __iter__(self) -> Iterator[Batch]:
        ignore_index = self.source.taxonomy.ignore_index
        for step in self._steps:
            queued, waited = self._prefetcher.ready, self._prefetcher.wait_seconds
            prepared = list(islice(self._prefetcher, len(self._slots)))
            waited = self._prefetcher.wait_seconds - waited
            self.metrics.add_step(queued / len(self._slots), waited)
            yield _collate(step, list(self._slots), prepared, ignore_index)

    def close(self) -> None:
        """Drop what was prepared ahead; no thread, connection or unfinished file is left."""
        readers = self._source, self._target
        for reader in readers:
            reader.stop()
        self._prefetcher.close()
        if self._cache is not None:
            self._cache.close()
        for reader in readers:
            reader.close()

    def _works(self, start_step: int) -> Iterator[Work[Prepared]]:
        for step in count(start_step):
            for slot in self._slots:
                draw = self._sampler.draw(step, slot)
                reads = [(self._source, draw.source)]
                if self._targets:
                    reads.append((self._target, draw.target))
                yield Work(reads, partial(self._prepare, draw))

    def _prepare(self, draw: Draw, source: pa.Buffer, target: pa.Buffer | None = None) -> Prepared:
        crop = self._prepare_source(draw, self._source.decode(source))
        if target is None:
            return draw, crop, None
        return draw, crop, self._prepare_target(draw, self._target.decode(target))

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


def load_samples(reader: ShardReader, indices: Iterable[int]) -> Iterator[Sample]:
    """The samples at `indices`, in order, read ahead; for evaluation. Closes the reader."""
    works = (Work([(reader, index)], reader.decode) for index in indices)
    prefetcher = Prefetcher(works, threads=DECODERS, ahead=READ_AHEAD)
    try:
        yield from prefetcher
    finally:
        reader.stop()
        prefetcher.close()
        reader.close()


def _collate(step: int, slots: list[int], prepared: list[Prepared], ignore_index: int) -> Batch:
    def stack(planes: list[torch.Tensor | None]) -> torch.Tensor | None:
        complete = planes and all(plane is not None for plane in planes)
        return torch.stack(planes) if complete else None

    def labels(samples: list[Sample]) -> torch.Tensor | None:
        planes = stack([sample.label for sample in samples])
        if planes is None:
            return None
        planes = planes.long()[:, None]
        # The method ignores 255, whatever the data set's own value is.
        return planes.masked_fill_(planes == ignore_index, 255)

    draws, sources, targets = zip(*prepared, strict=True)
    targets = [target for target in targets if target is not None]
    return Batch(
        step=step,
        slots=slots,
        seeds=[draw.seed for draw in draws],
        source_keys=[sample.key for sample in sources],
        target_keys=[sample.key for sample in targets],
        source_image=stack([sample.image for sample in sources]),
        source_label=labels(sources),
        target_image=stack([sample.image for sample in targets]),
        target_label=labels(targets),
        target_reference=stack([sample.reference for sample in targets]),
    )
