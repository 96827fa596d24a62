"""Reading samples of a data set by byte range, each verified.

Arrow does not notice a flipped payload byte: every read compares the xxh3 of the bytes with the
manifest's, and a sample that stays damaged is an error with its key in it, never skipped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyarrow as pa
import torch
import xxhash
from torchvision.io import ImageReadMode, decode_image

from cluster.shards import LABEL_CODEC, Manifest, shard_schema
from cluster.storage import Storage, StorageError

READ_ATTEMPTS = 3


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

    def __init__(self, storage: Storage, manifest: Manifest, *, references: bool = False) -> None:
        self._storage = storage
        self._manifest = manifest
        self._references = references
        self._schema = shard_schema(manifest.taxonomy.num_classes)

    def read(self, index: int) -> Sample:
        """Fetch and decode one sample. Raises StorageError with its key."""
        return self.decode(index, self.fetch(index))

    def fetch(self, index: int) -> pa.Buffer:
        """The verified bytes of one sample, tried READ_ATTEMPTS times."""
        manifest = self._manifest
        shard = manifest.shards[manifest.shard[index]].name
        place = int(manifest.offsets[index]), int(manifest.lengths[index])
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(0.1 * 2**attempt)
            try:
                payload = self._storage.get_range(shard, *place)
            except StorageError as error:
                reason = str(error)
                continue
            if xxhash.xxh3_64_intdigest(payload) == manifest.checksums[index]:
                return pa.py_buffer(payload)
            reason = f"{manifest.url}/{shard}: bytes {place[0]}+{place[1]} fail their checksum"
        raise StorageError(
            f"sample {manifest.keys[index]!r} is unreadable ({READ_ATTEMPTS} attempts): {reason}"
        )

    def decode(self, index: int, payload: pa.Buffer) -> Sample:
        batch = pa.ipc.read_record_batch(payload, self._schema)
        key = batch["key"][0].as_py()
        size = batch["height"][0].as_py(), batch["width"][0].as_py()
        image = self._image(key, batch["image"][0])
        label, reference = None, None
        if batch["label"][0].is_valid:
            compressed = batch["label"][0].as_buffer()
            plane = pa.decompress(compressed, size[0] * size[1], codec=LABEL_CODEC)
            label = torch.frombuffer(plane, dtype=torch.uint8).view(size)
        if self._references:
            if not batch["reference"][0].is_valid:
                raise StorageError(
                    f"sample {key!r} of {self._manifest.url} has no reference image, which "
                    "teacher.day_night needs: ingest dark_zurich's split train or set it to false"
                )
            reference = self._image(key, batch["reference"][0])
        return Sample(key, image, label, reference)

    def _image(self, key: str, column: pa.BinaryScalar) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(column.as_buffer()), dtype=torch.uint8)
        try:
            return decode_image(encoded, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise StorageError(f"sample {key!r} of {self._manifest.url}: {error}") from None
