"""A shard gives back what went in, and a damaged one is an error with the sample's key."""

import ast
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.io import decode_image

from cluster import manifest as manifests
from cluster import ranges
from cluster.manifest import read_manifest
from cluster.reader import ShardReader
from cluster.shards import record_batches
from cluster.storage import StorageConfig, StorageError, open_storage


@pytest.fixture
def storage(folder, write_dataset, tmp_path, monkeypatch):
    """12 samples in shards of 5, 5 and 2; a damaged one is read again at once."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0)
    storage = open_storage(str(tmp_path), StorageConfig())
    write_dataset(folder, storage)
    return storage


def test_samples_round_trip(folder, storage):
    manifest = read_manifest(storage)
    reader = ShardReader(storage, manifest)
    assert len(manifest) == 12 and manifest.image_size == (48, 64)
    assert list(manifest.keys) == [f"frame{i:03d}" for i in range(12)]
    for i, key in enumerate(manifest.keys):
        sample = reader.read(i)
        label = decode_image(folder / f"labels/{key}.png")[0]
        assert sample.key == key
        assert torch.equal(sample.image, decode_image(folder / f"images/{key}.jpg"))
        assert torch.equal(sample.label, label)
        counts = np.bincount(label.numpy().ravel(), minlength=256)[:5]
        assert manifest.pixel_counts[i].tolist() == counts.tolist()


def test_image_bytes_are_the_file_s_own_and_any_arrow_tool_reads_them(folder, storage):
    table = pa.ipc.open_file(storage.get("shard-00000.arrow")).read_all()
    assert table["key"].to_pylist() == [f"frame{i:03d}" for i in range(5)]
    assert table["image"][0].as_py() == (folder / "images/frame000.jpg").read_bytes()
    assert table["reference"].null_count == 5


def test_an_unlabelled_data_set(folder, write_dataset, tmp_path):
    storage = open_storage(str(tmp_path), StorageConfig())
    write_dataset(folder, storage, labels=False)
    manifest = read_manifest(storage)
    assert not manifest.labelled
    assert manifest.pixel_counts.shape == (12, 5) and not manifest.pixel_counts.any()
    assert ShardReader(storage, manifest).read(3).label is None


@pytest.mark.parametrize("index", [0, 4, 11])
def test_a_flipped_byte_is_an_error_with_the_key(storage, index):
    manifest = read_manifest(storage)
    name = manifest.shards[manifest.shard[index]].name
    data = bytearray(storage.get(name))
    data[manifest.offsets[index] + manifest.lengths[index] // 2] ^= 1
    storage.put(name, bytes(data))
    reader = ShardReader(storage, manifest)
    with pytest.raises(StorageError, match=f"'{manifest.keys[index]}'.*checksum"):
        reader.read(index)
    reader.read(index - 1 if index else 1)


def test_a_truncated_shard_is_an_error_with_the_key(storage):
    manifest = read_manifest(storage)
    storage.put("shard-00000.arrow", storage.get("shard-00000.arrow")[: manifest.offsets[2] + 9])
    with pytest.raises(StorageError, match=r"'frame002'.*checksum"):
        ShardReader(storage, manifest).read(2)


def test_a_missing_shard_is_an_error_with_the_key(storage):
    manifest = read_manifest(storage)
    storage.delete("shard-00005.arrow")
    with pytest.raises(StorageError, match=r"'frame007'.*shard-00005.arrow: no such object"):
        ShardReader(storage, manifest).read(7)


def test_a_missing_manifest_says_what_to_run(tmp_path):
    storage = open_storage(str(tmp_path / "nothing"), StorageConfig())
    with pytest.raises(StorageError, match=r"no manifest at file://.*python -m jobs.ingest"):
        read_manifest(storage)


@pytest.mark.parametrize(
    ("version", "fix"), [(3, "update the code or ingest again"), (1, "ingest it again")]
)
def test_another_schema_version_is_refused(
    storage, folder, write_dataset, monkeypatch, version, fix
):
    with monkeypatch.context() as other:
        other.setattr(manifests, "SCHEMA_VERSION", version)
        write_dataset(folder, storage)
    with pytest.raises(StorageError, match=f"schema_version {version}, this code reads 2: {fix}"):
        read_manifest(storage)


def test_a_damaged_manifest_is_refused(storage):
    intact = storage.get("manifest.arrow")
    for place in range(0, len(intact), 97):
        damaged = bytearray(intact)
        damaged[place] ^= 0x10
        storage.put("manifest.arrow", bytes(damaged))
        try:
            manifest = read_manifest(storage)
        except StorageError as error:
            assert "manifest.arrow" in str(error)
        else:  # a byte that carries nothing: padding, or the copy of the schema in the footer
            assert list(manifest.keys) == [f"frame{i:03d}" for i in range(12)]
    for content in (b"", b"no arrow", intact[:200]):
        storage.put("manifest.arrow", content)
        with pytest.raises(StorageError, match="damaged"):
            read_manifest(storage)


def test_the_manifest_carries_the_taxonomy(folder, storage):
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    taxonomy = read_manifest(storage).taxonomy
    assert taxonomy.names == tuple(entry["name"] for entry in classes)
    assert taxonomy.ignore_index == 255


def test_a_large_manifest_lies_once_on_a_node(
    folder, write_dataset, storage, tmp_path, monkeypatch
):
    small = read_manifest(storage)
    monkeypatch.setattr(manifests, "SHARED_FROM_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mapped = [read_manifest(storage) for _ in range(2)]
    (plain,) = (tmp_path / "temporary").rglob("*-*/*-*")
    assert Path("/proc/self/maps").read_text().count(str(plain)) == 2
    for manifest in mapped:
        assert list(manifest.keys) == list(small.keys) and manifest.shards == small.shards
        for name in ("shard", "offsets", "lengths", "checksums", "heights", "pixel_counts"):
            assert np.array_equal(getattr(manifest, name), getattr(small, name))
    write_dataset(folder, storage, labels=False)
    assert not read_manifest(storage).labelled and mapped[0].labelled
    damaged = bytearray(storage.get("manifest.arrow"))
    ((begin, end),) = record_batches(pa.py_buffer(damaged))
    damaged[(begin + end) // 2] ^= 1
    storage.put("manifest.arrow", bytes(damaged))
    with pytest.raises(StorageError, match="damaged"):
        read_manifest(storage)
    assert not list((tmp_path / "temporary").rglob("*-*/*-*"))


def test_a_label_needs_nothing_but_pyarrow(folder, storage):
    table = pa.ipc.open_file(storage.get("shard-00000.arrow")).read_all()
    height, width = table["height"][0].as_py(), table["width"][0].as_py()
    plane = pa.decompress(table["label"][0].as_buffer(), height * width, codec="lz4")
    expected = decode_image(folder / "labels/frame000.png")[0].numpy()
    assert np.array_equal(np.frombuffer(plane, np.uint8).reshape(height, width), expected)


def test_the_documented_lines_read_a_data_set(folder, write_dataset, tmp_path, monkeypatch):
    write_dataset(folder, open_storage(str(tmp_path / "shards/day"), StorageConfig()))
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "ipc" in part)
    assert len(ast.parse(block).body) == 3
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block, found)
    assert found["manifest"].num_rows == 12
    assert found["shard"]["image"][0].as_py() == (folder / "images/frame000.jpg").read_bytes()
