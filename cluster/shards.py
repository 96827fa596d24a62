"""Arrow shards: one sample a record batch, so one ranged GET reads one sample.

A data set is a folder of objects: `shard-NNNNN-HASH.arrow` files and `manifest.arrow`. Both are
ordinary Arrow IPC files that any Arrow tool opens. The manifest holds the place (shard, offset,
length) and the checksum of every sample. It is written last, so a folder without one is no data
set, and shards are named by their content, so a data set being replaced stays whole until its
new manifest stands.

Arrow does not notice a flipped payload byte, hence the checksums; `cluster.reader` compares them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cluster.storage import Storage, StorageError
from sepico.taxonomies import Taxonomy

MANIFEST = "manifest.arrow"
SCHEMA_VERSION = 1
# A file starts with this magic, padded to 8 bytes; the schema's message follows, then the batches.
ARROW_MAGIC_LENGTH = 8
# Written once and read many times; the level costs nothing when reading.
LABEL_CODEC = "zstd"
LABEL_COMPRESSION_LEVEL = 9


@dataclass(frozen=True)
class Shard:
    """One shard object: its `size` in bytes and its xxh3-64 `checksum`."""

    name: str
    size: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """What a data set holds and where; all arrays run over its N samples, sorted by key."""

    url: str
    taxonomy: Taxonomy
    labelled: bool
    keys: list[str]
    shards: list[Shard]
    options: dict[str, Any]  # how it was ingested, for the record
    shard: np.ndarray  # (N,) int32, index into `shards`
    offsets: np.ndarray  # (N,) int64, bytes
    lengths: np.ndarray  # (N,) int64, bytes
    checksums: np.ndarray  # (N,) uint64, xxh3 of those bytes
    heights: np.ndarray  # (N,) int32, pixels
    widths: np.ndarray  # (N,) int32, pixels
    pixel_counts: np.ndarray  # (N, C) int64, zeros when unlabelled

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) if all images have one size."""
        sizes = np.unique(np.stack([self.heights, self.widths], axis=1), axis=0)
        return (int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None


def shard_schema(num_classes: int) -> pa.Schema:
    """Columns of a shard. `label` is the (H, W) uint8 plane, zstd-compressed."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.binary()),  # JPEG or PNG bytes
            ("label", pa.binary()),
            ("reference", pa.binary()),  # a paired image of the same place, null when there is none
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("pixel_counts", pa.list_(pa.int64(), num_classes)),
        ]
    )


class ShardWriter:
    """Builds one shard in memory and remembers where each sample lies."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._num_classes = taxonomy.num_classes
        self._schema = shard_schema(taxonomy.num_classes)
        self._sink = pa.BufferOutputStream()
        self._codec = pa.Codec(LABEL_CODEC, compression_level=LABEL_COMPRESSION_LEVEL)
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        # The writer emits the file's head together with the first batch.
        self._end = ARROW_MAGIC_LENGTH + self._schema.serialize().size
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        key: str,
        image: bytes,
        size: tuple[int, int],
        label: np.ndarray | None,
        reference: bytes | None = None,
    ) -> None:
        """Append a sample: encoded `image` of `size` (H, W) and its (H, W) uint8 `label`.

        `reference` is an encoded image of the same size.
        """
        counts = None
        if label is not None:
            counts = np.bincount(label.ravel(), minlength=256)[: self._num_classes].tolist()
        row = {"key": key, "height": size[0], "width": size[1], "pixel_counts": counts}
        blobs = {"image": image, "label": None, "reference": reference}
        if label is not None:
            blobs["label"] = self._codec.compress(label.tobytes(), asbytes=True)
        self._writer.write_batch(pa.RecordBatch.from_pylist([row | blobs], self._schema))
        begin, self._end = self._end, self._sink.tell()
        self._rows.append(row | {"offset": begin, "length": self._end - begin})

    def finish(self) -> tuple[bytes, list[dict[str, Any]]]:
        """The shard's bytes and its manifest rows (key, place, checksum, size, counts)."""
        self._writer.close()
        data = self._sink.getvalue().to_pybytes()
        view = memoryview(data)
        for row in self._rows:
            payload = view[row["offset"] : row["offset"] + row["length"]]
            row["checksum"] = xxhash.xxh3_64_intdigest(payload)
        return data, self._rows


def write_manifest(
    storage: Storage,
    taxonomy: Taxonomy,
    shards: list[tuple[Shard, list[dict[str, Any]]]],
    *,
    labelled: bool,
    options: dict[str, Any],
) -> None:
    """Make the data set real: one object, written at once, after all shards are in place."""
    rows = [row | {"shard": i} for i, (_, rows) in enumerate(shards) for row in rows]
    table = pa.Table.from_pylist(rows, _manifest_schema(taxonomy.num_classes))
    description = {
        "schema_version": SCHEMA_VERSION,
        "taxonomy": taxonomy.to_dict(),
        "labelled": labelled,
        "shards": [asdict(shard) for shard, _ in shards],
        "options": options,
    }
    text = json.dumps(description, sort_keys=True)
    table = table.replace_schema_metadata({"sepico": text, "checksum": _digest(text, table)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.put(MANIFEST, sink.getvalue().to_pybytes())


def read_manifest(storage: Storage) -> Manifest:
    """Raises StorageError, in one line, for a missing, damaged or newer manifest."""
    where = f"{storage.url}/{MANIFEST}"
    if not storage.exists(MANIFEST):
        raise StorageError(f"no manifest at {storage.url}: run `python -m jobs.ingest` first")
    try:
        table = pa.ipc.open_file(storage.get(MANIFEST)).read_all()
        text = table.schema.metadata[b"sepico"].decode()
        description = json.loads(text)
        version = description["schema_version"]
        if version <= SCHEMA_VERSION:
            intact = table.schema.metadata[b"checksum"].decode() == _digest(text, table)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{where} is damaged or no manifest: ingest it again") from None
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{where} has schema_version {version}, this code reads up to {SCHEMA_VERSION}: "
            "update the code or ingest again"
        )
    if not intact:
        raise StorageError(f"{where} is damaged (checksum differs): ingest it again")
    return _manifest(storage.url, table, description)


def _manifest_schema(num_classes: int) -> pa.Schema:
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.int32()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("checksum", pa.uint64()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("pixel_counts", pa.list_(pa.int64(), num_classes)),
        ]
    )


def _manifest(url: str, table: pa.Table, description: dict[str, Any]) -> Manifest:
    taxonomy = Taxonomy.from_dict(description["taxonomy"])
    column = {name: table[name].combine_chunks() for name in table.column_names}
    counts = np.zeros((len(table), taxonomy.num_classes), np.int64)
    if description["labelled"]:
        counts = column["pixel_counts"].flatten().to_numpy().reshape(counts.shape)
    return Manifest(
        url=url,
        taxonomy=taxonomy,
        labelled=description["labelled"],
        keys=column["key"].to_pylist(),
        shards=[Shard(**shard) for shard in description["shards"]],
        options=description["options"],
        shard=column["shard"].to_numpy(),
        offsets=column["offset"].to_numpy(),
        lengths=column["length"].to_numpy(),
        checksums=column["checksum"].to_numpy(),
        heights=column["height"].to_numpy(),
        widths=column["width"].to_numpy(),
        pixel_counts=counts,
    )


def _digest(text: str, table: pa.Table) -> str:
    """xxh3 of the manifest's content, independent of how Arrow lays it out."""
    digest = xxhash.xxh3_64(text.encode())
    for name in table.column_names:
        digest.update(json.dumps(table[name].to_pylist()).encode())
    return digest.hexdigest()
