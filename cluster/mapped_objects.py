"""A large object in memory that all processes of a node share.

A file is mapped where it lies. A large object of a bucket is downloaded once a node, into the
temporary folder, and mapped from there: one process fetches it while the others wait. The copy
stays for the next process and is replaced when the object has changed, so a node holds one copy
of an object at most.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import xxhash

from cluster.storage import Storage, StorageError

# Smaller objects are fetched by every process: a copy of their own costs less than a file.
SHARED_FROM_BYTES = 16 * 2**20


def map_object(storage: Storage, key: str) -> pa.Buffer:
    """The object's bytes, read-only. Raises StorageError as `Storage.get` does."""
    size, version = storage.describe(key)
    if size < SHARED_FROM_BYTES:
        return pa.py_buffer(storage.get(key))
    return _map(storage.folder / key if storage.folder else _node_copy(storage, key, version))


def _node_copy(storage: Storage, key: str, version: str) -> Path:
    """The file that holds `version` of the object on this node."""
    folder = Path(tempfile.gettempdir(), f"sepico-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user: remove it or set TMPDIR")
    name = xxhash.xxh3_64_hexdigest(f"{storage.url}/{key}".encode())
    path = folder / f"{name}-{xxhash.xxh3_64_hexdigest(version.encode())}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if the process dies
        if not path.exists():
            # What an earlier version or a process that died left: a mapping of it lives on.
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            partial = path.with_suffix(".partial")
            storage.download(key, partial)
            partial.replace(path)
    return path


def _map(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()
