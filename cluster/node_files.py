"""A file in the temporary folder that all processes of a node map, so that memory holds it once.

One process writes it while the others wait. It stays for the next process, and a newer version
replaces it, so a node keeps one file of a name at most.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import xxhash

from cluster.storage import StorageError


def map_node_file(name: str, version: str, write: Callable[[Path], None]) -> pa.Buffer:
    """The read-only bytes of the file that `write` makes, unless this node has this version.

    Raises what `write` raises, and StorageError where the temporary folder cannot be used.
    """
    folder = Path(tempfile.gettempdir(), f"sepico-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} belongs to another user: remove it or set TMPDIR")
        return _map(folder, name, version, write)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}: make room or set TMPDIR") from None


def _map(folder: Path, name: str, version: str, write: Callable[[Path], None]) -> pa.Buffer:
    prefix, suffix = (xxhash.xxh3_64_hexdigest(text.encode()) for text in (name, version))
    path = folder / f"{prefix}-{suffix}"
    with (folder / f"{prefix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if the process dies
        if not path.exists():
            _replace(folder, prefix, path, write)
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()


def _replace(folder: Path, prefix: str, path: Path, write: Callable[[Path], None]) -> None:
    # What an earlier version or a process that died left; who maps such a file keeps it.
    for old in folder.glob(f"{prefix}-*"):
        old.unlink()
    partial = path.with_suffix(".partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
