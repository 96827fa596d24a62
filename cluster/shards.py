"""Arrow shards: one sample a record batch, so one ranged GET reads one sample.

A data set is a folder of objects: `shard-NNNNN-INPUTS-CHECKSUM.arrow` files and `manifest.arrow`.
Both are ordinary Arrow IPC files that any Arrow tool opens. The manifest holds the place (shard,
offset, length) and the checksum of every sample. It is written last, so a folder without one is
no data set, and shards are named by their content, so a data set being replaced stays whole until
its new manifest stands.

A manifest is one record batch without compression: its columns are used where they lie, in a
file that all processes of a node map, so ten million samples cost a process next to nothing.

Arrow does not notice a flipped payload byte, hence the checksums; `cluster.reader` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cluster.mapped_objects import map_object
from cluster.storage import MissingObjectError, Storage, StorageError
from sepico.taxonomies import Taxonomy

MANIFEST = "manifest.arrow"
SCHEMA_VERSION = 2
# A file starts with this magic, padded to 8 bytes; the schema's message follows, then the batches.
ARROW_MAGIC_LENGTH = 8
# Written once and read many times: of the codecs this one decodes fastest, and at this level its
# planes are about as small as PNG's.
LABEL_CODEC = "lz4"
LABEL_COMPRESSION_LEVEL = 9


class UnreadableManifestError(StorageError):
    """The one line of a manifest that is damaged or of another version."""


@dataclass(frozen=True)
class Shard:
    """One shard object: its `size` in bytes and its xxh3-64 `checksum`."""

    name: str
    size: int
    checksum: int


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


def shard_schema(num_classes: int) -> pa.Schema:
    """Columns of a shard. `label` is the (H, W) uint8 plane, lz4-compressed (an LZ4 frame)."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.binary()),  # JPEG or PNG bytes
            ("label", pa.binary()),
            ("reference", pa.binary()),  # a paired image of the same place, null when there is none
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("pixel_counts", pa.list_(pa.uint32(), num_classes)),
        ]
    )


def record_batches(data: pa.Buffer) -> list[tuple[int, int]]:
    """Where the record batches of an Arrow IPC file lie: (begin, end) in bytes, in order.

    Raises pa.ArrowException, EOFError or OSError where `data` is no such file.
    """
    reader = pa.BufferReader(data)
    reader.seek(ARROW_MAGIC_LENGTH)
    pa.ipc.read_message(reader)  # the schema
    places, begin = [], reader.tell()
    while True:
        try:
            pa.ipc.read_message(reader)
        except EOFError:  # the marker before the footer
            return places
        places.append((begin, reader.tell()))
        begin = reader.tell()


def write_manifest(
    storage: Storage,
    taxonomy: Taxonomy,
    shards: list[tuple[Shard, pa.Table]],
    *,
    labelled: bool,
    options: dict[str, Any],
) -> None:
    """Make the data set real: one object, written at once, after all shards are in place.

    `shards` come with their rows as `shard_writer.shard_rows` finds them.
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
    metadata = {"sepico": text, "checksum": _digest(text, batch.serialize())}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch)
    storage.put(MANIFEST, sink.getvalue())


def read_manifest(storage: Storage) -> Manifest:
    """Raises StorageError, in one line, for a missing manifest.

    One that is damaged, or of another schema version, is an UnreadableManifestError.
    """
    where = f"{storage.url}/{MANIFEST}"
    try:
        data = map_object(storage, MANIFEST)
    except MissingObjectError:
        raise StorageError(
            f"no manifest at {storage.url}: run `python -m jobs.ingest` first"
        ) from None
    try:
        metadata = pa.ipc.open_file(data).schema.metadata
        text = metadata[b"sepico"].decode()
        description = json.loads(text)
        version = description["schema_version"]
        if version == SCHEMA_VERSION:
            ((begin, end),) = record_batches(data)
            intact = metadata[b"checksum"].decode() == _digest(text, data[begin:end])
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
    return _manifest(storage.url, data[begin:end], description)


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


def _manifest(url: str, payload: pa.Buffer, description: dict[str, Any]) -> Manifest:
    taxonomy = Taxonomy.from_dict(description["taxonomy"])
    schema = _manifest_schema(taxonomy.num_classes, description["labelled"])
    batch = pa.ipc.read_record_batch(payload, schema)
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


def _digest(text: str, payload: pa.Buffer) -> str:
    """xxh3 of the description and of the record batch's bytes."""
    digest = xxhash.xxh3_64(text.encode())
    digest.update(payload)
    return digest.hexdigest()
