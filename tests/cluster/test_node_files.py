"""A node has a file once, whole, and of the newest version."""

import errno
import fcntl
import os
import tempfile
import threading

import pytest

from cluster.node_files import map_node_file
from cluster.storage import StorageError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The node's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(temporary):
    """Files of the node, without locks."""
    return [path for path in temporary.rglob("*-*") if path.is_file()]


def test_all_who_ask_at_once_share_one_file(temporary):
    written, found = [], []

    def write(path):
        written.append(path)
        (lock,) = path.parent.glob("*.lock")
        with lock.open("w") as another, pytest.raises(BlockingIOError):  # whoever asks now waits
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.write_bytes(bytes(range(200)) * 50)

    def ask():
        found.append(map_node_file("name", "1", write).to_pybytes())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [bytes(range(200)) * 50] * 6
    assert len(written) == 1 and len(files(temporary)) == 1


def test_a_newer_version_replaces_the_file_and_spares_its_readers(temporary):
    before = map_node_file("name", "1", lambda path: path.write_bytes(b"1" * 1000))
    other = map_node_file("other", "1", lambda path: path.write_bytes(b"o"))
    after = map_node_file("name", "2", lambda path: path.write_bytes(b"2" * 1000))
    assert (before.to_pybytes(), after.to_pybytes()) == (b"1" * 1000, b"2" * 1000)
    assert other.to_pybytes() == b"o" and len(files(temporary)) == 2


def test_a_writer_that_fails_leaves_nothing(temporary):
    def fails(path):
        path.write_bytes(b"part")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_node_file("name", "1", fails)
    assert not files(temporary)


def test_what_a_killed_writer_left_is_no_file_of_the_node(temporary):
    def is_killed(path):
        path.with_suffix(".left").write_bytes(b"part")  # its own name would be removed
        path.write_bytes(b"whole")

    map_node_file("name", "1", is_killed)
    mapped = map_node_file("name", "2", lambda path: path.write_bytes(b"whole"))
    assert mapped.to_pybytes() == b"whole" and len(files(temporary)) == 1


def test_the_files_are_the_user_s_own(temporary):
    map_node_file("name", "1", lambda path: path.write_bytes(b"1"))
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o077 == 0 and folder.name == f"sepico-{os.getuid()}"


def test_a_full_disk_is_one_line(temporary):
    def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device: make room or set TMPDIR"):
        map_node_file("name", "1", fails)
