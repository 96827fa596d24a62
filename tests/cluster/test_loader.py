"""Batches are a function of the step: whatever the workers, threads, store, or first step."""

import dataclasses
import shutil
import threading
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cluster.crops import crop_box, rare_class_crop
from cluster.data import DataConfig, check_data, check_set
from cluster.loader import TrainLoader, load_samples
from cluster.manifest import read_manifest
from cluster.read_metrics import summarize
from cluster.reader import ShardReader
from cluster.storage import StorageConfig, StorageError, open_storage

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "crop.npz")
CROP = {"crop_height": 32, "crop_width": 40, "rcs_min_pixels": 60}


@pytest.fixture(scope="module")
def urls(folder, write_dataset, tmp_path_factory):
    """Labelled source and unlabelled target shards of the same images."""
    root = tmp_path_factory.mktemp("shards")
    for name, labels in (("source", True), ("target", False)):
        write_dataset(folder, open_storage(str(root / name), StorageConfig()), labels=labels)
    return {"source": str(root / "source"), "target": str(root / "target")}


def batches(urls, steps=6, storage=None, rank=0, world_size=1, global_batch=6, start=0, **options):
    data = DataConfig(**urls, **{**CROP, **options})
    loader = TrainLoader(
        data,
        storage or StorageConfig(),
        seed=11,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        start_step=start,
    )
    try:
        return list(islice(loader, steps))
    finally:
        loader.close()


def assert_equal(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_a_batch_holds_what_it_says(urls):
    first, second = batches(urls, steps=2)
    assert (first.step, second.step) == (0, 1)
    assert first.slots == [0, 1, 2, 3, 4, 5] and len(set(first.seeds)) == 6
    assert first.source_image.shape == (6, 3, 32, 40) and first.source_image.dtype == torch.uint8
    assert first.source_label.shape == (6, 1, 32, 40) and first.source_label.dtype == torch.int64
    assert first.target_image.shape == (6, 3, 48, 64) and first.target_image.dtype == torch.uint8
    assert first.target_label is None
    assert sorted(first.target_keys + second.target_keys) == [f"frame{i:03d}" for i in range(12)]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_workers_together_have_the_batch_of_one(urls, world_size):
    whole = batches(urls)
    parts = [batches(urls, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        for rank in range(world_size):
            part = parts[rank][step]
            mine = slice(rank, None, world_size)
            assert part.step == step and part.slots == expected.slots[mine]
            assert part.seeds == expected.seeds[mine]
            assert part.source_keys == expected.source_keys[mine]
            assert part.target_keys == expected.target_keys[mine]
            assert torch.equal(part.source_image, expected.source_image[mine])
            assert torch.equal(part.source_label, expected.source_label[mine])
            assert torch.equal(part.target_image, expected.target_image[mine])


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_resume_continues_the_sequence(urls, start):
    whole = batches(urls, steps=9)
    resumed = batches(urls, steps=9 - start, start=start)
    for expected, found in zip(whole[start:], resumed, strict=True):
        assert_equal(expected, found)


def test_iterating_again_goes_on_with_the_next_step(urls):
    data = DataConfig(**urls, **CROP)
    loader = TrainLoader(
        data, StorageConfig(), seed=11, global_batch=6, rank=0, world_size=1, start_step=1
    )
    with closing(loader):
        found = [*islice(loader, 2), *islice(loader, 2)]
    for expected, batch in zip(batches(urls, steps=4, start=1), found, strict=True):
        assert_equal(expected, batch)


def test_threads_and_prefetch_change_nothing(urls):
    slow, fast = batches(urls, threads=1, prefetch=1), batches(urls, threads=5, prefetch=7)
    for a, b in zip(slow, fast, strict=True):
        assert_equal(a, b)


def test_without_targets_none_is_read_and_the_source_is_the_same(urls, tmp_path):
    shutil.copy(Path(urls["target"]) / "manifest.arrow", tmp_path)  # its shards are not there
    data = DataConfig(urls["source"], str(tmp_path), **CROP)
    loader = TrainLoader(
        data, StorageConfig(), seed=11, global_batch=6, rank=0, world_size=1, targets=False
    )
    with closing(loader):
        found = list(islice(loader, 3))
    for expected, batch in zip(batches(urls, steps=3), found, strict=True):
        sources = {"target_image": None, "target_keys": []}
        assert_equal(dataclasses.replace(expected, **sources), batch)
        assert batch.to(torch.device("cpu")).target_image is None
        assert batch.samples == batch.source_keys
        assert expected.samples[0] == f"{batch.source_keys[0]} with {expected.target_keys[0]}"


@pytest.fixture(scope="module")
def bucket(urls, folder, write_dataset, s3):
    """The same two data sets in a bucket, and how it is reached."""
    config = StorageConfig(endpoint=s3.endpoint)
    root = s3.make_bucket("loader")
    remote = {name: f"{root}/{name}" for name in urls}
    for name, url in remote.items():
        write_dataset(folder, open_storage(url, config), labels=name == "source")
    return remote, config


def test_a_bucket_and_a_folder_give_the_same_batches(urls, bucket):
    remote, config = bucket
    for a, b in zip(batches(urls), batches(remote, storage=config), strict=True):
        assert_equal(a, b)


def test_flips_and_crops_carry_image_and_label_together(urls):
    """Each crop is found, flipped or not, in the stored image with the stored label there."""
    reader = _reader(urls["source"])
    samples = {sample.key: sample for sample in map(reader.read, range(12))}
    flipped = set()
    for batch in batches(urls, steps=3):
        for image, label, key in zip(
            batch.source_image, batch.source_label, batch.source_keys, strict=True
        ):
            sample = samples[key]
            found = [
                flip
                for flip in (False, True)
                for y in range(48 - 32 + 1)
                for x in range(64 - 40 + 1)
                if torch.equal(
                    image.flip(-1) if flip else image, sample.image[:, y : y + 32, x : x + 40]
                )
                and torch.equal(
                    (label.flip(-1) if flip else label)[0],
                    sample.label[y : y + 32, x : x + 40].long(),
                )
            ]
            assert found, key
            flipped.update(found)
    assert flipped == {False, True}


def test_labels_of_a_labelled_target_come_along_for_analysis(urls):
    batch = batches({"source": urls["source"], "target": urls["source"]}, steps=1)[0]
    unlabelled = batches(urls, steps=1)[0]
    assert batch.target_label.shape == (6, 1, 48, 64) and batch.target_label.dtype == torch.int64
    assert torch.equal(batch.target_image, unlabelled.target_image)


def test_a_flipped_byte_is_an_error_with_the_key(folder, write_dataset, urls, tmp_path):
    storage = open_storage(str(tmp_path), StorageConfig())
    write_dataset(folder, storage, labels=False)
    manifest = read_manifest(storage)
    data = bytearray(storage.get("shard-00005.arrow"))
    data[manifest.offsets[7] + 300] ^= 4
    storage.put("shard-00005.arrow", bytes(data))
    before = threading.active_count()
    with pytest.raises(StorageError, match=r"'frame007'.*checksum"):
        batches({"source": urls["source"], "target": str(tmp_path)}, steps=2)
    assert threading.active_count() == before


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "bucket"])
def test_closing_leaves_nothing(urls, bucket, tmp_path, remote):
    """No thread, no child, no file or connection open, no file in the making."""
    places, config = bucket if remote else (urls, StorageConfig())

    closed = []  # kept, so that nothing is only garbage

    def read():
        data = DataConfig(**places, **CROP, prefetch=20, cache=str(tmp_path / "cache"))
        loader = TrainLoader(data, config, seed=1, global_batch=6, rank=0, world_size=1)
        assert len(list(islice(loader, 2))) == 2
        loader.close()
        closed.append(loader)
        return set(threading.enumerate()), psutil.Process().children(), open_files()

    before = set(threading.enumerate()), psutil.Process().children()
    connected = len(connections(config))
    # The runtime of the client belongs to the process: the first time makes it.
    files_before = read()[2]
    for _ in range(3):
        threads, children, files = read()
        assert (threads, children) == before and len(files) <= len(files_before)
    assert len(connections(config)) <= connected
    assert not list((tmp_path / "cache").glob("*.part"))


def open_files():
    """What this process holds open besides sockets."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(link.readlink()))
    return [name for name in names if not name.startswith("socket:")]


def connections(config):
    """This process's connections to the store."""
    found = psutil.Process().net_connections("tcp")
    places = [f"http://{c.raddr.ip}:{c.raddr.port}" for c in found if c.raddr]
    return [place for place in places if place == config.endpoint]


def test_waiting_is_measured(urls):
    loader = TrainLoader(
        DataConfig(**urls, **CROP), StorageConfig(), seed=0, global_batch=2, rank=0, world_size=1
    )
    next(iter(loader))
    assert summarize(loader.metrics.take())["data_wait_share"] > 0
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch": 14},
            r"data.source file://.* holds 12 images, fewer than global_batch 14",
        ),
        ({"crop_height": 50}, r"'frame000' is 64x48, smaller than the crop 40x50: lower"),
    ],
)
def test_data_that_cannot_fill_a_batch_is_refused(urls, options, message):
    with pytest.raises(ValueError, match=message):
        batches(urls, **options)


def test_data_is_checked_before_work_starts(urls, tmp_path):
    config = StorageConfig()
    assert check_data(DataConfig(**urls, **CROP), config, 6).labelled
    with pytest.raises(ValueError, match=r"data\.target is not set"):
        check_set(DataConfig(source=urls["source"], **CROP))
    with pytest.raises(ValueError, match="has no labels"):
        check_data(DataConfig(source=urls["target"], target=urls["target"], **CROP), config, 6)
    with pytest.raises(ValueError, match="no manifest at"):
        check_data(DataConfig(source=str(tmp_path), target=urls["target"], **CROP), config, 6)


def test_target_images_must_have_one_size(urls, make_folder, write_dataset, tmp_path):
    mixed = make_folder(tmp_path / "mixed")
    other = make_folder(tmp_path / "other", count=13, size=(56, 64))
    for part, end in (("images", "jpg"), ("labels", "png")):
        (other / f"{part}/frame012.{end}").rename(mixed / f"{part}/frame012.{end}")
    write_dataset(mixed, open_storage(str(tmp_path / "shards"), StorageConfig()))
    with pytest.raises(ValueError, match="differ in size: ingest it with --size"):
        batches({**urls, "target": str(tmp_path / "shards")})
    assert batches({**urls, "source": str(tmp_path / "shards")}, steps=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("crop_height", 0), ("crop_max_ratio", 1.5), ("rcs_temperature", 0.0), ("crop_tries", -1)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"data.{key}"):
        DataConfig(**{key: value})


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_evaluation_reads_every_sample_once_in_order(urls, rank):
    samples = load_samples(_reader(urls["source"]), range(rank, 12, 3))
    assert [sample.key for sample in samples] == [f"frame{i:03d}" for i in range(rank, 12, 3)]


def test_an_evaluation_that_stops_early_leaves_no_thread(urls):
    before = set(threading.enumerate())
    samples = load_samples(_reader(urls["source"]), range(12))
    next(samples)
    samples.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("case", range(4))
def test_the_crop_box_equals_the_authors(case):
    height, width, ratio, seed = GOLDEN[f"par_{case}"]
    state = np.random.RandomState(int(seed))
    box = crop_box(
        GOLDEN[f"seg_{case}"],
        (int(height), int(width)),
        lambda n: state.randint(0, n),
        max_ratio=ratio,
        tries=10,
        ignore_index=255,
    )
    assert list(box) == GOLDEN[f"noprod_{case}"].tolist()


@pytest.mark.parametrize(
    ("first", "ratio", "draws"),
    [
        (55, 0.55, 11),  # a share of the ratio itself is too large, though 0.55 * 100 rounds up
        (54, 0.55, 1),
        (100, 0.9, 11),
        (100, 1.0, 1),  # there is nothing to balance
    ],
)
def test_a_box_is_drawn_until_no_class_has_the_ratio(first, ratio, draws):
    label = (np.arange(100) >= first).astype(np.uint8).reshape(10, 10)
    drawn = []
    options = {"max_ratio": ratio, "tries": 10, "ignore_index": 255}
    crop_box(label, (10, 10), lambda n: drawn.append(n) or 0, **options)
    assert len(drawn) == 2 * draws


def test_a_crop_is_drawn_again_until_it_holds_the_rare_class():
    label = np.tile(np.arange(8, dtype=np.uint8).repeat(8), (64, 1))  # 8 columns of 8 pixels
    hits = 0
    for seed in range(50):
        y1, y2, x1, x2 = rare_class_crop(
            label,
            (16, 24),
            np.random.default_rng(seed),
            rare_class=3,
            min_pixels=16 * 6,
            max_ratio=0.75,
            tries=10,
            ignore_index=255,
        )
        hits += np.count_nonzero(label[y1:y2, x1:x2] == 3) > 16 * 6
    assert hits > 45  # one box in two does; eleven are drawn


def _reader(url):
    storage = open_storage(url, StorageConfig())
    return ShardReader(storage, read_manifest(storage))
