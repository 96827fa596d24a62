"""The cache saves requests; whatever happens to its folder, samples are right."""

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from cluster import cache as cache_module
from cluster.cache import ShardCache
from cluster.config import TrainConfig
from cluster.data import DataConfig
from cluster.loader import TrainLoader
from cluster.manifest import read_manifest
from cluster.ranges import RangeReader, ReadCounters
from cluster.reader import ShardReader
from cluster.storage import StorageConfig, StorageError, open_storage
from cluster.training import resolve
from tests.processes import fork_context

CONFIG = StorageConfig()


@pytest.fixture(scope="module")
def url(folder, write_dataset, tmp_path_factory):
    """12 samples in shards of 5, 5 and 2."""
    root = tmp_path_factory.mktemp("cached")
    write_dataset(folder, open_storage(str(root), CONFIG))
    return str(root)


class Worker:
    """A reader with a cache of its own, as each process of a node has one."""

    def __init__(self, url, folder, limit=10**9):
        storage = open_storage(url, CONFIG)
        self.counters = ReadCounters()
        self.cache = ShardCache(str(folder), limit)
        self.manifest = read_manifest(storage)
        self.reader = ShardReader(storage, self.manifest, cache=self.cache, counters=self.counters)

    def read(self, *indices):
        """Keys read, and how many of them came from the cache."""
        self.counters.take()
        keys = [self.reader.read(i).key for i in indices]
        return keys, self.counters.take()["cache_hits"]

    def finish_downloads(self):
        self.cache._downloads.submit(lambda: None).result()

    def close(self):
        self.reader.stop()
        self.cache.close()
        self.reader.close()


@pytest.fixture
def worker(url, tmp_path):
    workers = []

    def make(**options):
        workers.append(Worker(url, tmp_path / "cache", **options))
        return workers[-1]

    yield make
    for made in workers:
        made.close()


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name != "lock")


def make_idle(tmp_path, age=1000):
    """The shard read last, as if that were `age` seconds ago."""
    newest = max((tmp_path / "cache").glob("*.arrow"), key=lambda path: path.stat().st_mtime)
    then = newest.stat().st_mtime - age
    os.utime(newest, (then, then))
    return newest


def test_a_shard_is_streamed_first_and_then_read_from_the_cache(worker, tmp_path):
    one = worker()
    assert one.read(0) == (["frame000"], 0)
    one.finish_downloads()
    assert one.read(*range(5)) == ([f"frame{i:03d}" for i in range(5)], 5)
    assert one.read(5)[1] == 0
    assert one.counters.take()["requests"] == 0
    other = worker()  # another process of the node
    assert other.read(3, 4)[1] == 2
    assert other.counters.take()["requests"] == 0


def test_a_damaged_cached_sample_is_read_from_the_store_and_the_shard_replaced(worker, tmp_path):
    one = worker()
    one.read(0)
    one.finish_downloads()
    path = next((tmp_path / "cache").glob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[one.manifest.offsets[2] + 200] ^= 1
    path.write_bytes(data)
    assert one.read(2) == (["frame002"], 0)
    assert one.read(2) == (["frame002"], 0)  # asks for the shard again
    one.finish_downloads()
    assert one.read(2) == (["frame002"], 1)


@pytest.mark.parametrize("length", [0, 300])
def test_a_truncated_cached_shard_is_read_from_the_store(worker, tmp_path, length):
    one = worker()
    one.read(0)
    one.finish_downloads()
    os.truncate(next((tmp_path / "cache").glob("*.arrow")), length)
    assert one.read(4) == (["frame004"], 0)


def test_the_least_recently_read_shard_makes_room(worker, tmp_path):
    sizes = [shard.size for shard in worker().manifest.shards]
    one = worker(limit=sizes[0] + sizes[1] + sizes[2] - 1)
    paths = []
    for index, age in ((0, 1000), (5, 500)):
        one.read(index)
        one.finish_downloads()
        paths.append(make_idle(tmp_path, age))
    one.read(0)  # now the other one is the least recently read
    one.read(10)
    one.finish_downloads()
    assert len(files(tmp_path)) == 2 and paths[0].exists() and not paths[1].exists()
    assert one.read(0)[1] == 1 and one.read(10)[1] == 1 and one.read(5)[1] == 0


def test_of_idle_shards_the_older_one_makes_room(worker, tmp_path):
    sizes = [shard.size for shard in worker().manifest.shards]
    one = worker(limit=sizes[0] + sizes[1] + sizes[2] - 1)
    paths = []
    for index, age in ((0, 500), (5, 1000)):
        one.read(index)
        one.finish_downloads()
        paths.append(make_idle(tmp_path, age))
    one.read(10)
    one.finish_downloads()
    assert paths[0].exists() and not paths[1].exists()


def test_shards_in_use_stay_and_the_limit_holds(worker, tmp_path):
    sizes = [shard.size for shard in worker().manifest.shards]
    one = worker(limit=sizes[0] + sizes[1] + sizes[2] - 1)
    for index in (0, 5, 10, 0, 5, 10):
        one.read(index)
        one.finish_downloads()
    assert len(files(tmp_path)) == 2
    assert [one.read(index)[1] for index in (0, 5, 10)] == [1, 1, 0]


def test_what_a_killed_worker_left_is_removed(url, worker, tmp_path):
    """It dies in the middle of a download: no half shard is read, its file goes."""
    ready, child_ready = multiprocessing.Pipe()
    child = fork_context().Process(
        target=_stall_in_download, args=(url, str(tmp_path / "cache"), child_ready), daemon=True
    )
    child.start()
    assert ready.poll(60)
    one = worker()
    one.read(0)
    one.finish_downloads()
    (part,) = files(tmp_path)
    assert part.endswith(".part")  # the child lives and downloads it: it is left alone
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    two = worker()
    assert two.read(0) == (["frame000"], 0)
    two.finish_downloads()
    assert files(tmp_path) == [part.replace(".part", ".arrow")]
    assert two.read(0) == (["frame000"], 1)


def _stall_in_download(url, folder, connection):
    worker = Worker(url, folder)

    def stall(*_):
        connection.send("downloading")
        signal.pause()

    worker.cache._fill = stall
    worker.read(0)
    worker.finish_downloads()


@pytest.mark.parametrize("loss", ["its download failed", "its writer died", "it was evicted"])
def test_a_missing_shard_is_asked_for_again(worker, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(cache_module, "FIRST_PAUSE_S", 0)
    one = worker()
    if loss == "its download failed":
        with monkeypatch.context() as outage:
            outage.setattr(ShardCache, "_fill", _fail)
            one.read(0)
            one.finish_downloads()
    elif loss == "its writer died":
        shard = one.manifest.shards[0]
        path = one.cache._path(one.reader._ranges, shard)
        other = one.cache._reserve(path, path.with_suffix(".part"), shard.size)
        one.read(0)
        one.finish_downloads()
        os.close(other)  # the lock goes, as when its process ends
    else:
        one.read(0)
        one.finish_downloads()
        make_idle(tmp_path).unlink()
    assert one.read(0)[1] == 0
    one.finish_downloads()
    assert one.read(0)[1] == 1 and len(files(tmp_path)) == 1


def _fail(*_):
    raise StorageError("503")


def test_pauses_before_a_shard_is_asked_for_again_double(worker, monkeypatch):
    tries = []
    monkeypatch.setattr(ShardCache, "_fill", lambda *_: tries.append(now) or _fail())
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now)
    one = worker()
    for now in range(0, 1000, 20):  # noqa: B007
        one.read(0)
        one.finish_downloads()
    assert tries == [0, 60, 180, 420, 900]


def test_workers_download_a_shard_once(url, tmp_path):
    with fork_context().Pool(3) as pool:
        counts = pool.starmap(_read_all_twice, [(url, str(tmp_path / "cache"))] * 3)
    assert len(files(tmp_path)) == 3
    stored = sum((tmp_path / "cache" / name).stat().st_size for name in files(tmp_path))
    downloaded = sum(counts)
    assert downloaded == stored


def _read_all_twice(url, folder):
    """Bytes that this worker downloaded into the cache."""
    worker = Worker(url, folder)
    fill, downloaded = worker.cache._fill, 0

    def counting(ranges, shard, file):
        nonlocal downloaded
        downloaded += shard.size
        return fill(ranges, shard, file)

    worker.cache._fill = counting
    for _ in range(2):
        keys, _ = worker.read(*range(12))
        assert keys == [f"frame{i:03d}" for i in range(12)]
        worker.finish_downloads()
    worker.close()
    return downloaded


def test_a_disk_that_fills_up_in_a_download_is_one_warning(worker, tmp_path, monkeypatch):
    """Where the file system could not reserve the bytes."""

    def full(*_):
        raise OSError(28, "No space left on device")

    one = worker()
    monkeypatch.setattr(cache_module.os, "write", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 5, 10):
            one.read(index)
            one.finish_downloads()
        assert one.read(*range(12)) == ([f"frame{i:03d}" for i in range(12)], 0)
    messages = [str(w.message) for w in caught if "data.cache" in str(w.message)]
    assert len(messages) == 1, messages
    assert "No space left on device: samples are streamed" in messages[0]
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_warning(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="samples are streamed"):
        one = Worker(url, tmp_path / "file" / "cache")
    assert one.read(0) == (["frame000"], 0)
    one.close()


def test_a_full_disk_is_one_warning_and_streaming(url, tmp_path):
    with fork_context().Pool(1) as pool:
        messages, hits = pool.apply(_read_with_a_small_disk, (url, str(tmp_path / "cache")))
    assert hits == 0
    assert len(messages) == 1 and "File too large: samples are streamed" in messages[0]
    assert files(tmp_path) == []


def _read_with_a_small_disk(url, folder):
    worker = Worker(url, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 5, 10):
            worker.read(index)
            worker.finish_downloads()
        keys, hits = worker.read(*range(12))
    worker.close()
    assert keys == [f"frame{i:03d}" for i in range(12)]
    return [str(w.message) for w in caught if "data.cache" in str(w.message)], hits


def test_a_loader_without_its_cache_tells_whom_it_was_told_to(url):
    data = DataConfig(
        url, url, crop_height=32, crop_width=40, rcs_min_pixels=60, cache="/proc/nocache"
    )
    told = []
    loader = TrainLoader(
        data, CONFIG, seed=3, global_batch=4, rank=0, world_size=1, warn=told.append
    )
    loader.close()
    assert told == ["data.cache /proc/nocache: No such file or directory: samples are streamed"]


def test_who_may_not_write_reads_the_cache_and_streams_what_is_damaged_in_it(url):
    with tempfile.TemporaryDirectory() as place, fork_context().Pool(1) as pool:
        shutil.copytree(url, f"{place}/data")
        folder = Path(place, "cache")
        one = Worker(f"{place}/data", folder)
        one.read(0)
        one.finish_downloads()
        one.close()
        (path,) = folder.glob("*.arrow")
        data = bytearray(path.read_bytes())
        data[one.manifest.offsets[2] + 200] ^= 1
        path.write_bytes(data)
        for path in (Path(place), Path(place, "data")):
            path.chmod(0o755)
        folder.chmod(0o555)
        whole, damaged, messages = pool.apply(_read_only, (f"{place}/data", str(folder)))
        folder.chmod(0o755)
    assert whole == (["frame000"], 1) and damaged == (["frame002"], 0)
    assert len(messages) == 1 and "Permission denied: samples are streamed" in messages[0]


def _read_only(url, folder):
    worker = Worker(url, folder)
    worker.read(0)  # imports what it needs
    if os.getuid() == 0:  # whom permissions do not stop
        os.setuid(65534)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = worker.read(0), worker.read(2)
    worker.close()
    return *found, [str(w.message) for w in caught if "data.cache" in str(w.message)]


def test_a_folder_removed_in_a_download_leaves_no_file_open(worker, tmp_path, monkeypatch):
    one = worker()
    monkeypatch.setattr(ShardCache, "_fill", lambda *_: shutil.rmtree(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="samples are streamed"):
        one.read(0)
        one.finish_downloads()
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in opened if ".part" in name]


def test_closing_stops_a_download_and_leaves_nothing(worker, tmp_path, monkeypatch):
    one = worker()
    monkeypatch.setattr(cache_module, "DOWNLOAD_BYTES", 100)
    read = RangeReader.read

    def read_and_close(self, *arguments):
        one.cache._closed.set()
        return read(self, *arguments)

    monkeypatch.setattr(RangeReader, "read", read_and_close)
    one.cache.read(one.reader._ranges, one.manifest.shards[0], 0, 10)
    one.finish_downloads()
    one.close()
    assert files(tmp_path) == []
    with (tmp_path / "cache" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_batches_are_the_same_with_and_without_a_cache(url, tmp_path):
    def batches(cache):
        data = DataConfig(url, url, crop_height=32, crop_width=40, rcs_min_pixels=60, cache=cache)
        loader = TrainLoader(data, CONFIG, seed=3, global_batch=4, rank=0, world_size=1)
        stream = iter(loader)
        taken = [next(stream) for _ in range(6)]
        loader.close()
        return taken

    cached = str(tmp_path / "cache")
    for plain, cold, warm in zip(batches(""), batches(cached), batches(cached), strict=True):
        assert plain.source_keys == cold.source_keys == warm.source_keys
        assert torch.equal(plain.source_image, cold.source_image)
        assert torch.equal(plain.source_image, warm.source_image)
        assert torch.equal(plain.target_image, warm.target_image)


def test_a_relative_folder_is_below_where_the_job_was_started(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(url, url, crop_height=32, crop_width=40, rcs_min_pixels=60, cache="cache")
    assert resolve(TrainConfig(data=data)).data.cache == str(tmp_path / "cache")


def test_a_cache_smaller_than_a_shard_is_refused(url, tmp_path):
    data = DataConfig(
        url, url, crop_height=32, crop_width=40, rcs_min_pixels=60,
        cache=str(tmp_path), cache_bytes=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"data.cache_bytes 100 is less than a shard's \d+ bytes"):
        TrainLoader(data, CONFIG, seed=3, global_batch=4, rank=0, world_size=1)
