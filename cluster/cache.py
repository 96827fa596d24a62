"""Whole shards in a local folder that all workers of a node share, in any number of processes.

A sample whose shard is not there is streamed, and the shard is downloaded meanwhile, once a node:
nobody waits for the cache. A shard appears under its name by a rename, whole. Until then it is a
`.part` file that its writer holds locked; the kernel drops the lock when the writer dies, so an
unlocked `.part` is litter and is removed. Places are given out under the folder's own lock. The
names carry the content (shards are named by it), so nothing in the folder is ever out of date.

A worker asks for a missing shard again, whether its download failed, the worker that had begun it
died, or another job's shards made it go. The pauses double, so that neither a broken store nor data
that do not fit into the cache cost more than a few downloads of each shard.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import xxhash

from cluster.ranges import RangeReader
from cluster.shards import Shard
from cluster.storage import StorageError

DOWNLOAD_BYTES = 8 << 20
# A shard that some worker read this recently is in use. Evicting it for another one of the same
# data set would only move bytes: where the data do not fit, a share of them stays.
IDLE_S = 60
# From asking for a shard the first time to the second; each later pause is twice the one before.
FIRST_PAUSE_S = 60


class ShardCache:
    """Keeps shards in `folder`, `limit` bytes at most; the least recently read one goes first.

    A folder that cannot be written to (a full disk) is a call of `warn`, once; from then on shards
    that are not there are streamed.
    """

    def __init__(
        self, folder: str, limit: int, warn: Callable[[str], None] = warnings.warn
    ) -> None:
        self._folder, self._limit, self._warn = Path(folder), limit, warn
        self._downloads = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._asked: dict[Path, tuple[float, float]] = {}  # next time, pause after it
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)

    def read(self, ranges: RangeReader, shard: Shard, offset: int, length: int) -> pa.Buffer | None:
        """Bytes of a shard, unverified; None, and it is asked for, if it is not there."""
        path = self._path(ranges, shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            self._ask(ranges, shard, path)
            return None
        try:
            with suppress(OSError):  # another user's shard, or a folder that is read-only
                os.utime(file)
            return pa.py_buffer(os.pread(file, length, offset))
        except OSError:
            return None
        finally:
            os.close(file)

    def drop(self, ranges: RangeReader, shard: Shard) -> None:
        """Forget a shard that turned out damaged: it is downloaded again."""
        path = self._path(ranges, shard)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)
        with self._lock:
            self._asked.pop(path, None)

    def close(self) -> None:
        """Stop downloading; returns when no thread and no unfinished file of ours is left."""
        with self._lock:
            self._closed.set()
        self._downloads.shutdown(wait=True, cancel_futures=True)

    def _path(self, ranges: RangeReader, shard: Shard) -> Path:
        name = f"{ranges.url}/{shard.name} {shard.size} {shard.checksum}"
        return self._folder / f"{xxhash.xxh3_128_hexdigest(name.encode())}.arrow"

    def _ask(self, ranges: RangeReader, shard: Shard, path: Path) -> None:
        with self._lock:
            now = time.monotonic()
            due, pause = self._asked.get(path, (now, FIRST_PAUSE_S))
            if now < due or self._closed.is_set():
                return
            self._asked[path] = now + pause, 2 * pause
            self._downloads.submit(self._download, ranges, shard, path)

    def _download(self, ranges: RangeReader, shard: Shard, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            file = self._reserve(path, part, shard.size)
            if file is None:
                return
            with os.fdopen(file, "wb"):
                whole = False
                try:
                    whole = self._fill(ranges, shard, file)
                finally:
                    with self._folder_lock():
                        if whole:
                            part.rename(path)
                        else:
                            part.unlink()
        except StorageError:
            pass  # whoever needs a sample of it streams, and reports what is wrong
        except OSError as error:
            self._give_up(error)

    def _fill(self, ranges: RangeReader, shard: Shard, file: int) -> bool:
        for begin in range(0, shard.size, DOWNLOAD_BYTES):
            if self._closed.is_set():
                return False
            length = min(DOWNLOAD_BYTES, shard.size - begin)
            body = memoryview(ranges.read(shard.name, begin, length, _shortage(length)))
            while body:
                body = body[os.write(file, body) :]
        return True

    def _reserve(self, path: Path, part: Path, size: int) -> int | None:
        """A locked, empty `part` of `size` reserved bytes; None if it is not ours to download."""
        with self._folder_lock():
            self._remove_litter()
            if path.exists() or part.exists() or not self._make_room(size):
                return None
            file = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.posix_fallocate(file, 0, size)
            except OSError:
                os.close(file)
                part.unlink()
                raise
            return file

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_litter(self) -> None:
        for part in self._folder.glob("*.part"):
            try:
                with part.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    part.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):
                continue  # its writer lives, or has just finished

    def _make_room(self, size: int) -> bool:
        """Remove idle shards, the least recently read first, if that makes enough room."""
        excess, idle = size - self._limit, []
        for path in [*self._folder.glob("*.arrow"), *self._folder.glob("*.part")]:
            with suppress(FileNotFoundError):  # dropped as damaged by another worker
                place = path.stat()
                excess += place.st_size
                if path.suffix == ".arrow" and time.time() - place.st_mtime > IDLE_S:
                    idle.append((place.st_mtime, place.st_size, path))
        if excess > sum(size for _, size, _ in idle):
            return False
        for _, freed, path in sorted(idle):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= freed
        return True

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._warn(f"data.cache {self._folder}: {error.strerror}: samples are streamed")


def _shortage(length: int) -> Callable[[pa.Buffer], str | None]:
    return lambda body: None if len(body) == length else f"{len(body)} bytes for {length}"
