"""A large object is on a node once, whole, and newest; a small one leaves no file."""

import os
import tempfile
import threading
from pathlib import Path

import pytest

from cluster import mapped_objects
from cluster.mapped_objects import map_object
from cluster.storage import MissingObjectError, Storage, StorageConfig, open_storage


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The node's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def bucket(s3, temporary, monkeypatch):
    monkeypatch.setattr(mapped_objects, "SHARED_FROM_BYTES", 100)
    config = StorageConfig(endpoint=s3.endpoint)
    return lambda name: open_storage(s3.make_bucket(f"mapped-{name}"), config)


def copies(temporary):
    """Files on the node, without locks."""
    return [path for path in temporary.rglob("*-*") if path.is_file()]


def test_all_who_ask_at_once_share_one_download(bucket, temporary, monkeypatch):
    storage = bucket("once")
    storage.put("large", bytes(range(200)) * 50)
    downloads, download = [], Storage.download

    def counted(self, key, path):
        downloads.append(key)
        download(self, key, path)

    monkeypatch.setattr(Storage, "download", counted)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(map_object(storage, "large").to_pybytes()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [bytes(range(200)) * 50] * 6
    assert downloads == ["large"] and len(copies(temporary)) == 1


def test_a_changed_object_replaces_the_copy_and_spares_its_readers(bucket, temporary):
    storage = bucket("changed")
    storage.put("large", b"1" * 1000)
    before = map_object(storage, "large")
    storage.put("large", b"2" * 1000)
    after = map_object(storage, "large")
    assert (before.to_pybytes(), after.to_pybytes()) == (b"1" * 1000, b"2" * 1000)
    assert len(copies(temporary)) == 1


def test_what_a_killed_download_left_is_no_copy(bucket, temporary, monkeypatch):
    storage = bucket("killed")
    storage.put("large", b"1" * 1000)

    def dies(self, key, path):
        path.write_bytes(b"1" * 10)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "download", dies)
        with pytest.raises(KeyboardInterrupt):
            map_object(storage, "large")
    assert map_object(storage, "large").to_pybytes() == b"1" * 1000
    assert len(copies(temporary)) == 1


def test_the_copies_are_the_user_s_own(bucket, temporary):
    storage = bucket("own")
    storage.put("large", b"1" * 1000)
    map_object(storage, "large")
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o077 == 0 and folder.name == f"sepico-{os.getuid()}"


def test_a_small_object_and_a_file_leave_nothing(bucket, temporary, tmp_path):
    storage = bucket("small")
    storage.put("small", b"1" * 99)
    assert map_object(storage, "small").to_pybytes() == b"1" * 99
    folder = open_storage(str(tmp_path / "data"), StorageConfig())
    folder.put("large", b"2" * 1000)
    mapped = map_object(folder, "large")
    assert mapped.to_pybytes() == b"2" * 1000
    assert str(tmp_path / "data/large") in Path("/proc/self/maps").read_text()
    assert not copies(temporary)


def test_a_missing_object_is_named(bucket):
    storage = bucket("missing")
    with pytest.raises(MissingObjectError, match="mapped-missing/large: no such object"):
        map_object(storage, "large")
