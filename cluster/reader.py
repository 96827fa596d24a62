"""Reading samples of a data set by byte range, each verified.

Arrow does not notice a flipped payload byte: every read, from the cache too, compares the xxh3 of
the bytes with the manifest's, and a sample that stays damaged is an error with its key in it,
never skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
import xxhash
from torchvision.io import ImageReadMode, decode_image

from cluster.cache import ShardCache
from cluster.manifest import Manifest, read_manifest
from cluster.ranges import PATIENCE, DamagedObjectError, RangeReader, ReadCounters
from cluster.shards import LABEL_CODEC, shard_schema
from cluster.storage import (
    AccessDeniedError,
    MissingObjectError,
    Storage,
    StorageConfig,
    StorageError,
    open_storage,
)


class LostSampleError(StorageError):
    """The one line of a sample that another attempt, or another worker, would not get either."""


@dataclass(frozen=True)
class Sample:
    """`image` (3, H, W) uint8 RGB; `label` (H, W) uint8 train ids, None when unlabelled.

    `reference` (3, H, W) uint8 RGB shows the same place, None where it was not asked for.
    """

    key: str
    image: torch.Tensor
    label: torch.Tensor | None
    reference: torch.Tensor | None = None


class ShardReader:
    """Random access to the samples of one data set; usable from many threads.

    `references` asks for each sample's reference image: a sample without one is then an error.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        *,
        references: bool = False,
        cache: ShardCache | None = None,
        counters: ReadCounters | None = None,
    ) -> None:
        self.manifest = manifest
        self._ranges = RangeReader(storage, counters)
        self._cache = cache
        self._references = references
        self._schema = shard_schema(manifest.taxonomy.num_classes)

    def read(self, index: int) -> Sample:
        """Fetch and decode one sample. Raises StorageError with its key."""
        return self.decode(self.fetch([index])[0])

    def fetch(self, indices: Sequence[int]) -> list[pa.Buffer]:
        """The verified bytes of samples of one shard, sorted by place, in one request.

        Raises StorageError with the key of one that cannot be read, LostSampleError where its
        object is missing, denied or damaged.
        """
        self._ranges.counters.add(samples=len(indices))
        manifest = self.manifest
        shard = manifest.shards[manifest.shard[indices[0]]]
        begin, end = manifest.span(indices)
        if self._cache is not None:
            cached = self._cache.read(self._ranges, shard, begin, end - begin)
            if cached is not None and self._damaged(indices, cached) is None:
                self._ranges.counters.add(cache_hits=len(indices))
                return self._split(indices, cached)
            if cached is not None:
                self._cache.drop(self._ranges, shard)
        failed = indices[0]

        def damage(body: pa.Buffer) -> str | None:
            nonlocal failed
            damaged = self._damaged(indices, body)
            if damaged is None:
                return None
            failed = damaged
            place = int(manifest.offsets[failed]), int(manifest.lengths[failed])
            return f"bytes {place[0]}+{place[1]} fail their checksum"

        try:
            return self._split(indices, self._ranges.read(shard.name, begin, end - begin, damage))
        except StorageError as error:
            key = manifest.keys[failed]
            lost = isinstance(error, (MissingObjectError, AccessDeniedError, DamagedObjectError))
            kind = LostSampleError if lost else StorageError
            raise kind(f"sample {key!r} is unreadable: {error}") from None

    def decode(self, payload: pa.Buffer) -> Sample:
        batch = pa.ipc.read_record_batch(payload, self._schema)
        key = batch["key"][0].as_py()
        size = batch["height"][0].as_py(), batch["width"][0].as_py()
        image = self._image(key, batch["image"][0])
        label, reference = None, None
        if batch["label"][0].is_valid:
            compressed = batch["label"][0].as_buffer()
            # Arrow's own pool returns each plane to the kernel: that costs more than decompressing.
            pool = pa.system_memory_pool()
            plane = pa.decompress(
                compressed, size[0] * size[1], codec=LABEL_CODEC, memory_pool=pool
            )
            label = torch.frombuffer(plane, dtype=torch.uint8).view(size)
        if self._references:
            if not batch["reference"][0].is_valid:
                raise LostSampleError(
                    f"sample {key!r} of {self.manifest.url} has no reference image, which "
                    "teacher.day_night needs: ingest it with references/ beside images/ (of "
                    "dark_zurich the split train), or set it to false"
                )
            reference = self._image(key, batch["reference"][0])
        return Sample(key, image, label, reference)

    def stop(self) -> None:
        """End reads that wait to be repeated: they raise StorageError."""
        self._ranges.stop()

    def close(self) -> None:
        """Close the connections, once no thread reads any more."""
        self._ranges.close()

    def _split(self, indices: Sequence[int], body: pa.Buffer) -> list[pa.Buffer]:
        offsets, lengths = self.manifest.offsets, self.manifest.lengths
        begin = offsets[indices[0]]
        return [body.slice(int(offsets[i] - begin), int(lengths[i])) for i in indices]

    def _damaged(self, indices: Sequence[int], body: pa.Buffer) -> int | None:
        """The first sample whose bytes are not what was written."""
        checksums = self.manifest.checksums
        view = memoryview(body)  # where the body is short, so are its slices
        begin = self.manifest.offsets[indices[0]]
        for index in indices:
            offset = self.manifest.offsets[index] - begin
            payload = view[offset : offset + self.manifest.lengths[index]]
            if xxhash.xxh3_64_intdigest(payload) != checksums[index]:
                return index
        return None

    def _image(self, key: str, column: pa.BinaryScalar) -> torch.Tensor:
        # Through DLPack torch shares the fetched bytes; `frombuffer` would want them writable.
        encoded = column.as_buffer()
        encoded = pa.Array.from_buffers(pa.uint8(), len(encoded), [None, encoded])
        try:
            return decode_image(torch.from_dlpack(encoded), mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise LostSampleError(f"sample {key!r} of {self.manifest.url}: {error}") from None


def open_reader(
    url: str,
    config: StorageConfig,
    *,
    references: bool = False,
    cache: ShardCache | None = None,
    counters: ReadCounters | None = None,
) -> ShardReader:
    """Open the data set at a URL. Raises StorageError as `read_manifest` does."""
    storage = open_storage(url, config, PATIENCE)
    manifest = read_manifest(storage)
    return ShardReader(storage, manifest, references=references, cache=cache, counters=counters)
