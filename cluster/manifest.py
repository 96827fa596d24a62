"""The manifest of a data set: where every sample lies, and what is in it.

A data set is a folder of objects: `shard-NNNNN-INPUTS-CHECKSUM.arrow` files and `manifest.arrow`.
The manifest, an Arrow IPC file too, holds the place (shard, offset, length) and the checksum of
every sample. It is written last, so a folder without one is no data set, and shards are named by
their content, so a data set being replaced stays whole until its new manifest stands.

A manifest is one record batch, compressed. Of a large one the first process of a node writes an
uncompressed copy into the temporary folder, and all processes use its columns where they lie: ten
million samples are downloaded once a node and cost a process next to nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cluster.node_files import map_node_file
from cluster.ranges import DamagedObjectError, read_again
from cluster.shards import Shard, record_batches
from cluster.storage import (
    MissingObjectError,
    Storage,
    StorageConfig,
    StorageError,
    open_storage,
)
from sepico.taxonomies import Taxonomy

MANIFEST = "manifest.arrow"
SCHEMA_VERSION = 2
# A smaller manifest is unpacked by every process: a copy of its own costs less than a file.
SHARED_FROM_BYTES = 4 * 2**20
DOWNLOAD_BYTES = 32 * 2**20  # a request: more would take longer than one may


class UnreadableManifestError(DamagedObjectError):
    """The one line of a manifest that is damaged or of another version."""


class Keys(Sequence[str]):
    """The keys of all samples, left in Arrow memory: ten million `str` would take a gigabyte."""

    def __init__(self, column: pa.StringArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return self._column[int(index)].as_py()


@dataclass(frozen=True)
class Manifest:
    """What a data set holds and where; all arrays run over its N samples, sorted by key.

    The arrays are read-only and lie in mapped memory. Samples of one shard are neighbours, in the
    order of their offsets.
    """

    url: str
    taxonomy: Taxonomy
    labelled: bool
    keys: Keys
    shards: list[Shard]
    options: dict[str, Any]  # how it was ingested, for the record
    shard: np.ndarray  # (N,) int32, index into `shards`
    offsets: np.ndarray  # (N,) int64, bytes
    lengths: np.ndarray  # (N,) uint32, bytes
    checksums: np.ndarray  # (N,) uint64, xxh3 of those bytes
    heights: np.ndarray  # (N,) int32, pixels
    widths: np.ndarray  # (N,) int32, pixels
    pixel_counts: np.ndarray  # (N, C) uint32, zeros when unlabelled

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) if all images have one size."""
        size = int(self.heights[0]), int(self.widths[0])
        same = self.heights.min() == self.heights.max() and self.widths.min() == self.widths.max()
        return size if same else None

    def span(self, indices: Sequence[int]) -> tuple[int, int]:
        """Where samples of one shard, sorted by place, begin and end in it, bytes."""
        end = self.offsets[indices[-1]] + self.lengths[indices[-1]]
        return int(self.offsets[indices[0]]), int(end)


def write_manifest(
    storage: Storage,
    taxonomy: Taxonomy,
    shards: list[tuple[Shard, pa.Table]],
    *,
    labelled: bool,
    options: dict[str, Any],
) -> None:
    """Make the data set real: one object, written at once, after all shards are in place.

    `shards` come with their rows as `shards.shard_rows` finds them.
    """
    schema = _manifest_schema(taxonomy.num_classes, labelled)
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(rows) for _, rows in shards])
    table = pa.concat_tables([rows for _, rows in shards])
    table = table.append_column("shard", pa.array(numbers)).select(schema.names)
    if not labelled:
        table = table.set_column(len(schema) - 1, "pixel_counts", pa.nulls(len(table)))
    (batch,) = table.combine_chunks().to_batches()
    description = {
        "schema_version": SCHEMA_VERSION,
        "taxonomy": taxonomy.to_dict(),
        "labelled": labelled,
        "shards": [asdict(shard) for shard, _ in shards],
        "options": options,
    }
    text = json.dumps(description, sort_keys=True)
    # The checksum stands before the bytes that it is of, and does not change them.
    checksum = _digest(text, _packed(batch))
    batch = batch.replace_schema_metadata({"sepico": text, "checksum": checksum})
    storage.put(MANIFEST, _packed(batch))


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a data set; read again, as samples are, where the store fails for a moment.

    Raises StorageError, in one line, for a missing manifest. One that stays damaged, or is of
    another schema version, is an UnreadableManifestError.
    """
    try:
        batch = read_again(lambda: _read(storage), time.sleep)
    except MissingObjectError:
        raise StorageError(
            f"no manifest at {storage.url}: run `python -m jobs.ingest` first"
        ) from None
    return _manifest(storage.url, batch)


def open_manifest(url: str, config: StorageConfig) -> Manifest:
    """The manifest of the data set at a URL, once its store is known to answer.

    Raises StorageError, in one line and within seconds where the store does not.
    """
    storage = open_storage(url, config)
    storage.check(MANIFEST)
    return read_manifest(storage)


def _read(storage: Storage) -> pa.RecordBatch:
    size, version = storage.describe(MANIFEST)
    if size < SHARED_FROM_BYTES:
        return _unpacked(storage.url, pa.py_buffer(storage.get(MANIFEST)))
    name = f"{storage.url}/{MANIFEST}"
    plain = map_node_file(name, version, lambda path: _write_plain(storage, size, path))
    return pa.ipc.open_file(plain).get_batch(0)


def _packed(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _unpacked(url: str, data: pa.Buffer) -> pa.RecordBatch:
    """The verified record batch of a manifest. Raises UnreadableManifestError."""
    where = f"{url}/{MANIFEST}"
    try:
        metadata = pa.ipc.open_file(data).schema.metadata
        text = metadata[b"sepico"].decode()
        version = json.loads(text)["schema_version"]
        if version == SCHEMA_VERSION:
            intact = metadata[b"checksum"].decode() == _digest(text, data)
            ((begin, end),) = record_batches(data)
    except (pa.ArrowException, OSError, EOFError, KeyError, TypeError, ValueError):
        raise UnreadableManifestError(
            f"{where} is damaged or no manifest: ingest it again"
        ) from None
    if version != SCHEMA_VERSION:
        fix = "update the code or ingest again" if version > SCHEMA_VERSION else "ingest it again"
        raise UnreadableManifestError(
            f"{where} has schema_version {version}, this code reads {SCHEMA_VERSION}: {fix}"
        )
    if not intact:
        raise UnreadableManifestError(f"{where} is damaged (checksum differs): ingest it again")
    description = json.loads(text)
    num_classes = Taxonomy.from_dict(description["taxonomy"]).num_classes
    schema = _manifest_schema(num_classes, description["labelled"]).with_metadata(metadata)
    return pa.ipc.read_record_batch(data[begin:end], schema)


def _write_plain(storage: Storage, size: int, path: Path) -> None:
    """Write the verified manifest as an Arrow file whose columns can be used where they lie."""
    packed = path.with_suffix(".packed")
    try:
        with packed.open("wb") as file:  # in ranges: each is granted a request's time
            for begin in range(0, size, DOWNLOAD_BYTES):
                file.write(storage.get_range(MANIFEST, begin, DOWNLOAD_BYTES))
        with pa.memory_map(str(packed)) as file:
            batch = _unpacked(storage.url, file.read_buffer())
    finally:
        packed.unlink(missing_ok=True)
    with path.open("wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        # Nobody compares this file with a checksum again: it must be whole after a crash too.
        file.flush()
        os.fsync(file.fileno())
    del batch
    pa.default_memory_pool().release_unused()  # a gigabyte that this process needs no more


def _manifest_schema(num_classes: int, labelled: bool) -> pa.Schema:
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.int32()),
            ("offset", pa.int64()),
            ("length", pa.uint32()),
            ("checksum", pa.uint64()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            # The column of nothing takes no bytes.
            ("pixel_counts", pa.list_(pa.uint32(), num_classes) if labelled else pa.null()),
        ]
    )


def _manifest(url: str, batch: pa.RecordBatch) -> Manifest:
    description = json.loads(batch.schema.metadata[b"sepico"])
    taxonomy = Taxonomy.from_dict(description["taxonomy"])
    shape = len(batch), taxonomy.num_classes
    if description["labelled"]:
        pixel_counts = batch["pixel_counts"].flatten().to_numpy().reshape(shape)
    else:
        pixel_counts = np.broadcast_to(np.uint32(0), shape)
    return Manifest(
        url=url,
        taxonomy=taxonomy,
        labelled=description["labelled"],
        keys=Keys(batch["key"]),
        shards=[Shard(**shard) for shard in description["shards"]],
        options=description["options"],
        shard=batch["shard"].to_numpy(),
        offsets=batch["offset"].to_numpy(),
        lengths=batch["length"].to_numpy(),
        checksums=batch["checksum"].to_numpy(),
        heights=batch["height"].to_numpy(),
        widths=batch["width"].to_numpy(),
        pixel_counts=pixel_counts,
    )


def _digest(text: str, data: pa.Buffer) -> str:
    """xxh3 of a manifest's description and of its record batch as it stands in the file."""
    digest = xxhash.xxh3_64(text.encode())
    ((begin, end),) = record_batches(data)
    digest.update(data[begin:end])
    return digest.hexdigest()
