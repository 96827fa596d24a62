"""Arrow shards: one sample a record batch, so one ranged GET reads one sample.

A shard is an ordinary Arrow IPC file that any Arrow tool opens. What the manifest says of it is
always read from its bytes, whether they were just written or come back from the store: there is
one way to know where a sample lies.

Arrow does not notice a flipped payload byte, hence the checksums; `cluster.reader` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from sepico.taxonomies import Taxonomy

# A file starts with this magic, padded to 8 bytes; the schema's message follows, then the batches.
ARROW_MAGIC_LENGTH = 8
# Written once and read many times: of the codecs this one decodes fastest, and at this level its
# planes are about as small as PNG's.
LABEL_CODEC = "lz4"
LABEL_COMPRESSION_LEVEL = 9


@dataclass(frozen=True)
class Shard:
    """One shard object: its `size` in bytes and its xxh3-64 `checksum`."""

    name: str
    size: int
    checksum: int


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


class ShardWriter:
    """Builds one shard, a record batch a sample."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._num_classes = taxonomy.num_classes
        self._schema = shard_schema(taxonomy.num_classes)
        self._sink = pa.BufferOutputStream()
        self._codec = pa.Codec(LABEL_CODEC, compression_level=LABEL_COMPRESSION_LEVEL)
        self._writer = pa.ipc.new_file(self._sink, self._schema)

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
        row = {"key": key, "height": size[0], "width": size[1], "image": image}
        row |= {"label": None, "reference": reference, "pixel_counts": None}
        if label is not None:
            row["label"] = self._codec.compress(label.tobytes(), asbytes=True)
            row["pixel_counts"] = np.bincount(label.ravel(), minlength=256)[: self._num_classes]
        self._writer.write_batch(pa.RecordBatch.from_pylist([row], self._schema))

    def finish(self) -> pa.Buffer:
        """The bytes of the shard."""
        self._writer.close()
        return self._sink.getvalue()


def shard_rows(data: pa.Buffer, num_classes: int) -> pa.Table:
    """The manifest's rows of a shard, in order: its samples, their places and checksums."""
    schema = shard_schema(num_classes)
    ranges = record_batches(data)
    payloads = [data[begin:end] for begin, end in ranges]
    samples = [pa.ipc.read_record_batch(payload, schema) for payload in payloads]
    described = [batch.select(["key", "height", "width", "pixel_counts"]) for batch in samples]
    places = {
        "offset": pa.array([begin for begin, _ in ranges], pa.int64()),
        "length": pa.array([end - begin for begin, end in ranges], pa.uint32()),
        "checksum": pa.array([xxhash.xxh3_64_intdigest(p) for p in payloads], pa.uint64()),
    }
    table = pa.Table.from_batches(described).combine_chunks()
    for name, column in places.items():
        table = table.append_column(name, column)
    return table


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
