"""A store that fails now and then costs time, never a sample; one that is broken says so fast."""

import numpy as np
import pytest
import torch

from cluster import manifest as manifests
from cluster import prefetch, ranges, reader, verification
from cluster.data import DataConfig
from cluster.loader import TrainLoader, load_samples
from cluster.manifest import UnreadableManifestError, read_manifest
from cluster.ranges import DamagedObjectError, RangeReader, ReadCounters
from cluster.read_metrics import summarize
from cluster.reader import LostSampleError, open_reader
from cluster.storage import Patience, StorageConfig, StorageError, open_storage
from tests.cluster.faulty_proxy import FAULTS, FaultyProxy

COUNT = 60


@pytest.fixture(scope="module")
def url(s3, make_folder, write_dataset, tmp_path_factory):
    url = f"{s3.make_bucket('faults')}/data"
    folder = make_folder(tmp_path_factory.mktemp("faults") / "data", count=COUNT)
    write_dataset(folder, open_storage(url, StorageConfig(endpoint=s3.endpoint)), per_shard=20)
    return url


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy without faults yet; reads are small and impatient, so that tests stay short."""
    monkeypatch.setattr(reader, "PATIENCE", Patience(stall_s=1, request_s=2, retries=0))
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(ranges, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(prefetch, "MERGE_GAP", -1)  # a request a sample
    with FaultyProxy(s3.endpoint) as proxy:
        yield proxy


def opened(url, proxy):
    counters = ReadCounters()
    return open_reader(url, StorageConfig(endpoint=proxy.endpoint), counters=counters), counters


@pytest.mark.parametrize("faults", [FAULTS, *((fault,) for fault in FAULTS)], ids="-".join)
def test_an_epoch_delivers_every_sample_once_and_intact(url, proxy, faults, s3):
    direct = open_reader(url, StorageConfig(endpoint=s3.endpoint))
    faulty, counters = opened(url, proxy)
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    proxy.share, proxy.faults = 0.1, faults
    samples = list(load_samples(faulty, order))
    assert [sample.key for sample in samples] == [direct.manifest.keys[i] for i in order]
    for index, sample in zip(order, samples, strict=True):
        expected = direct.read(index)
        assert torch.equal(sample.image, expected.image)
        assert torch.equal(sample.label, expected.label)
    spoiled = sum(proxy.served[fault] for fault in faults)
    counted = counters.take()
    # A loaded machine may be slower than the client is patient: at least those are repeated.
    assert 0 < spoiled <= counted["retries"]
    assert counted["requests"] == COUNT + counted["retries"] and counted["samples"] == COUNT


def test_batches_are_those_of_a_store_without_faults(url, proxy, s3):
    def batches(endpoint):
        data = DataConfig(url, url, crop_height=32, crop_width=40, rcs_min_pixels=60)
        config = StorageConfig(endpoint=endpoint)
        loader = TrainLoader(data, config, seed=3, global_batch=4, rank=0, world_size=1)
        try:
            stream = iter(loader)
            taken = [next(stream) for _ in range(10)]
        finally:
            loader.close()
        return taken, summarize(loader.metrics.take())

    expected, quiet = batches(s3.endpoint)
    proxy.share = 0.1
    found, noisy = batches(proxy.endpoint)
    for a, b in zip(expected, found, strict=True):
        assert a.source_keys == b.source_keys and a.target_keys == b.target_keys
        assert torch.equal(a.source_image, b.source_image)
        assert torch.equal(a.target_image, b.target_image)
    assert quiet["data_retries"] == 0 and noisy["data_retries"] > 0


@pytest.mark.parametrize(
    ("fault", "attempts", "lost"),
    [("slow_down", 10, False), ("reset", 10, False), ("flip", 8, True)],
)
def test_a_store_that_stays_broken_is_an_error_with_the_key(url, proxy, fault, attempts, lost):
    faulty, counters = opened(url, proxy)
    proxy.share, proxy.faults = 1.0, (fault,)
    match = f"'frame007' is unreadable: .*{attempts} attempts"
    with pytest.raises(StorageError, match=match) as caught:
        faulty.read(7)
    assert isinstance(caught.value, LostSampleError) == lost
    assert counters.take()["requests"] == attempts == proxy.served[fault]


def test_a_denied_sample_is_asked_for_once(url, proxy):
    faulty, _ = opened(url, proxy)
    proxy.share, proxy.faults = 1.0, ("denied",)
    with pytest.raises(LostSampleError, match=r"'frame007' is unreadable: .*access denied"):
        faulty.read(7)
    assert proxy.served["denied"] == 1


def test_a_lost_shard_is_asked_for_once(folder, write_dataset, proxy, s3):
    url = f"{s3.make_bucket('lost')}/data"
    storage = open_storage(url, StorageConfig(endpoint=s3.endpoint))
    write_dataset(folder, storage)
    faulty, counters = opened(url, proxy)
    storage.delete(faulty.manifest.shards[1].name)
    with pytest.raises(LostSampleError, match=r"'frame006' is unreadable: .*no such object"):
        faulty.read(6)
    assert counters.take()["requests"] == 1


# The client itself repeats an error of the store three times.
MOMENTARY = {"flip": ["flip"], "slow_down": ["slow_down"] * 4}


@pytest.mark.parametrize("fault", MOMENTARY)
@pytest.mark.parametrize("shared_from", [0, manifests.SHARED_FROM_BYTES])
def test_a_manifest_is_read_again(url, proxy, monkeypatch, tmp_path, fault, shared_from):
    monkeypatch.setattr(manifests, "SHARED_FROM_BYTES", shared_from)
    monkeypatch.setattr(manifests, "DOWNLOAD_BYTES", 500)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    proxy.planned = list(MOMENTARY[fault])
    manifest = read_manifest(open_storage(url, StorageConfig(endpoint=proxy.endpoint)))
    assert len(manifest) == COUNT
    assert proxy.served[fault] == len(MOMENTARY[fault])


def test_a_manifest_that_stays_damaged_is_an_error(url, proxy):
    proxy.planned = ["flip"] * 100
    with pytest.raises(UnreadableManifestError, match=r"damaged.*: ingest it again \(8 attempts\)"):
        read_manifest(open_storage(url, StorageConfig(endpoint=proxy.endpoint)))


@pytest.mark.parametrize("fault", MOMENTARY)
def test_a_shard_is_not_called_damaged_because_its_store_failed_for_a_moment(url, proxy, fault):
    storage, shard, samples = to_verify(url, proxy)
    proxy.planned = MOMENTARY[fault] * (1 if fault == "flip" else 2)
    assert verification.examine(storage, shard, samples)[0] == []
    assert not proxy.planned


def test_a_shard_that_cannot_be_reached_is_an_error_and_no_damage(url, proxy):
    storage, shard, samples = to_verify(url, proxy)
    proxy.planned = ["denied"]
    with pytest.raises(StorageError, match=f"{shard.name}: access denied"):
        verification.examine(storage, shard, samples)


def to_verify(url, proxy):
    storage = open_storage(url, StorageConfig(endpoint=proxy.endpoint))
    _, shard, samples = next(verification._shards(read_manifest(storage)))
    return storage, shard, samples


def test_pauses_double_up_to_a_limit_and_differ(tmp_path):
    pauses = []

    class Recorder:
        def wait(self, seconds):
            pauses.append(seconds)
            return False

    storage = open_storage(str(tmp_path), StorageConfig())
    storage.get_range = lambda *_: (_ for _ in ()).throw(StorageError("reset"))
    broken = RangeReader(storage)
    broken._stopped = Recorder()
    with pytest.raises(StorageError, match=r"reset \(10 attempts\)"):
        broken.read("key", 0, 1, lambda body: None)
    nominal = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0]
    factors = [pause / expected for pause, expected in zip(pauses, nominal, strict=True)]
    assert all(0.5 <= factor <= 1.5 for factor in factors) and len(set(factors)) == 9


def test_damaged_bytes_lengthen_no_pause(tmp_path, monkeypatch):
    pauses = []
    storage = open_storage(str(tmp_path), StorageConfig())
    storage.put("key", b"damaged")
    damaged = RangeReader(storage)
    monkeypatch.setattr(damaged._stopped, "wait", pauses.append)
    with pytest.raises(DamagedObjectError, match=r"bad \(8 attempts\)"):
        damaged.read("key", 0, 1, lambda body: "bad")
    assert len(pauses) == 7 and max(pauses) < ranges.FIRST_PAUSE_S


def test_stopping_ends_a_read_that_waits_to_be_repeated(url, proxy, monkeypatch):
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 1000)
    monkeypatch.setattr(ranges, "LONGEST_PAUSE_S", 1000)
    faulty, _ = opened(url, proxy)
    proxy.share, proxy.faults = 1.0, ("slow_down",)
    faulty.stop()
    with pytest.raises(StorageError, match="1 attempts"):
        faulty.read(7)
