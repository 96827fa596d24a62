"""A run goes on only with what it began with; refused before a worker starts."""

import json
import shutil
from contextlib import nullcontext

import pytest

from cluster.config import TrainConfig
from cluster.data import DataConfig
from cluster.run_config import check_continuation, described
from cluster.storage import StorageConfig, open_storage
from cluster.training import resolve, train
from sepico.config import ModelConfig


@pytest.fixture
def begun(folder, write_dataset, tmp_path):
    """`begun(**changes)`: the configuration of a run in TMP_PATH that has begun, changed."""
    for name, labels in (("source", True), ("target", False)):
        storage = open_storage(str(tmp_path / name), StorageConfig())
        write_dataset(folder, storage, labels=labels)

    def config(**changes) -> TrainConfig:
        data = DataConfig(
            source=str(tmp_path / "source"),
            target=str(tmp_path / "target"),
            crop_height=32,
            crop_width=64,
            rcs_min_pixels=50,
        )
        model = ModelConfig(encoder="tu-test_efficientnet", encoder_weights=None)
        return TrainConfig(**{"run": str(tmp_path / "run"), "data": data, "model": model} | changes)

    run = open_storage(str(tmp_path / "run"), StorageConfig())
    run.put("config.json", json.dumps(described(resolve(config()))).encode())
    return config


def test_another_architecture_is_refused(begun):
    other = ModelConfig(encoder="tu-test_resnet", encoder_weights=None)
    with pytest.raises(ValueError, match=r"model.encoder = 'tu-test_efficientnet', now it is"):
        train(begun(model=other))


def test_a_run_of_before_colours_were_kept_goes_on(begun):
    config = resolve(begun())
    run = open_storage(config.run, config.storage)
    older = json.loads(run.get("config.json"))
    del older["taxonomy"]
    run.put("config.json", json.dumps(older).encode())
    check_continuation(run, described(config))


@pytest.mark.parametrize(
    ("now", "same"), [("/b/mit.pth", True), ("/a/other.pth", False), (None, False)]
)
def test_weights_may_lie_in_another_folder_as_those_of_a_job_submitted_again(begun, now, same):
    config = resolve(begun())
    run = open_storage(config.run, config.storage)
    stored, wanted = json.loads(run.get("config.json")), described(config)
    stored["model"]["encoder_weights"], wanted["model"]["encoder_weights"] = "/a/mit.pth", now
    run.put("config.json", json.dumps(stored).encode())
    with nullcontext() if same else pytest.raises(ValueError, match=r"model\.encoder_weights"):
        check_continuation(run, wanted)


def test_data_whose_classes_became_others_are_refused(begun, folder, write_dataset, tmp_path):
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    classes = renamed / "classes.json"
    classes.write_text(classes.read_text().replace("class3", "tram"))
    for name, labels in (("source", True), ("target", False)):
        storage = open_storage(str(tmp_path / name), StorageConfig())
        write_dataset(renamed, storage, labels=labels)
    with pytest.raises(ValueError, match=r"started with classes = .*'class3'.*now .*'tram'"):
        train(begun())
