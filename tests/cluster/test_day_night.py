"""Reference images on their way from the shards into a batch, and what is refused before."""

import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch

from cluster import reader
from cluster.config import TrainConfig
from cluster.data import DataConfig, check_data
from cluster.dry_run import describe
from cluster.loader import TrainLoader
from cluster.manifest import read_manifest
from cluster.reader import ShardReader
from cluster.storage import StorageConfig, StorageError, open_storage
from cluster.training import resolve
from sepico.config import TeacherConfig
from sepico.taxonomies import CITYSCAPES_19, Taxonomy
from tests.cluster.engine_ranks import method_config

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def day(make_folder, tmp_path_factory):
    """Images for those of `folder` to refer to."""
    return make_folder(tmp_path_factory.mktemp("day") / "data", seed=5)


@pytest.fixture(scope="module")
def write_target(folder, write_dataset, tmp_path_factory):
    """`write_target(day)` writes a target set whose references lie in `day`; returns its URL."""

    def write(day):
        url = str(tmp_path_factory.mktemp("target"))
        write_dataset(folder, open_storage(url, STORAGE), labels=False, references=day)
        return url

    return write


@pytest.fixture(scope="module")
def write_source(folder, write_dataset, tmp_path_factory):
    """`write_source(taxonomy)` writes a labelled source set with these classes; returns its URL."""

    def write(taxonomy):
        copy = shutil.copytree(folder, tmp_path_factory.mktemp("source") / "data")
        (copy / "classes.json").write_text(json.dumps(taxonomy.to_dict()))
        url = str(tmp_path_factory.mktemp("shards"))
        write_dataset(copy, open_storage(url, STORAGE))
        return url

    return write


@pytest.fixture(scope="module")
def data(write_source, write_target, day):
    return make_data(write_source(CITYSCAPES_19), write_target(day))


def make_data(source, target):
    return DataConfig(source, target, crop_height=32, crop_width=40, rcs_min_pixels=60)


def batches(data, steps=4, rank=0, world_size=1, start=0, references=True):
    loader = TrainLoader(
        data,
        STORAGE,
        seed=11,
        global_batch=6,
        rank=rank,
        world_size=world_size,
        start_step=start,
        references=references,
    )
    try:
        return list(islice(loader, steps))
    finally:
        loader.close()


def open_reader(url, **options):
    storage = open_storage(url, STORAGE)
    return ShardReader(storage, read_manifest(storage), **options)


def test_a_reference_is_flipped_with_its_image(data, day, write_dataset, tmp_path):
    write_dataset(day, open_storage(str(tmp_path), STORAGE))
    nights = {sample.key: sample.image for sample in map(open_reader(data.target).read, range(12))}
    days = {sample.key: sample.image for sample in map(open_reader(str(tmp_path)).read, range(12))}
    flips = set()
    for batch in batches(data):
        assert batch.target_reference.dtype == torch.uint8
        for key, image, reference in zip(
            batch.target_keys, batch.target_image, batch.target_reference, strict=True
        ):
            flipped = not torch.equal(image, nights[key])
            flips.add(flipped)
            assert torch.equal(reference, days[key].flip(-1) if flipped else days[key]), key
    assert flips == {False, True}


def test_references_change_nothing_else_in_a_batch(data):
    plain, with_references = batches(data, references=False), batches(data)
    for a, b in zip(plain, with_references, strict=True):
        assert a.target_reference is None and a.target_keys == b.target_keys
        assert torch.equal(a.target_image, b.target_image)
        assert torch.equal(a.source_image, b.source_image)


def test_references_belong_to_slots_whatever_the_workers_and_the_first_step(data):
    whole = batches(data)
    parts = [batches(data, rank=rank, world_size=2) for rank in range(2)]
    for step, expected in enumerate(whole):
        for rank in range(2):
            mine = expected.target_reference[rank::2]
            assert torch.equal(parts[rank][step].target_reference, mine)
    resumed = batches(data, steps=1, start=3)[0]
    assert torch.equal(resumed.target_reference, whole[3].target_reference)


def test_a_reference_that_nobody_asks_for_is_not_decoded(data, monkeypatch):
    decoded = []
    decode = reader.decode_image
    monkeypatch.setattr(
        reader, "decode_image", lambda *a, **k: decoded.append(a) or decode(*a, **k)
    )
    assert open_reader(data.target).read(0).reference is None
    assert len(decoded) == 1
    assert open_reader(data.target, references=True).read(0).reference.shape == (3, 48, 64)
    assert len(decoded) == 3


def test_day_night_is_checked_before_work_starts(data, write_target):
    assert check_data(data, STORAGE, 6, day_night=True).labelled
    bare = make_data(data.source, write_target(None))
    with pytest.raises(ValueError, match=r"'frame000'.* no reference image.* references/ beside"):
        resolve(TrainConfig(data=bare, teacher=TeacherConfig(day_night=True)))
    resolve(TrainConfig(data=bare))


def test_a_dry_run_checks_day_night(data, write_target, capsys):
    config = TrainConfig(
        model=method_config("distcl", start=0).model,
        data=data,
        teacher=TeacherConfig(day_night=True),
    )
    config.model.num_classes = 0
    describe(config)
    assert "distcl, 19 classes" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'frame000'.* no reference image"):
        describe(replace(config, data=make_data(data.source, write_target(None))))


def test_day_night_needs_the_classes_of_cityscapes(data, write_source):
    renamed = Taxonomy(("street", *CITYSCAPES_19.names[1:]), CITYSCAPES_19.colors)
    other = make_data(write_source(renamed), data.target)
    with pytest.raises(ValueError, match=r"teacher.day_night needs the 19 classes of Cityscapes"):
        check_data(other, STORAGE, 6, day_night=True)
    check_data(other, STORAGE, 6)


def test_a_sample_without_a_reference_is_an_error_with_its_key(data, day, write_target, tmp_path):
    partial = shutil.copytree(day, tmp_path / "day")
    (partial / "images/frame007.jpg").unlink()
    with pytest.raises(StorageError, match=r"'frame007'.* no reference image"):
        batches(make_data(data.source, write_target(partial)), steps=2)
