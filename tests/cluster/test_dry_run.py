"""What a dry run says is what a run does."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cluster.config import EngineConfig, TrainConfig, ValidationConfig
from cluster.data import DataConfig
from cluster.dry_run import all_reduced_bytes, describe, model_state_bytes
from cluster.storage import StorageConfig, open_storage
from cluster.training import check_network
from sepico.config import ContrastConfig
from sepico.normalization import set_batch_norm
from sepico.step import AdaptationStep
from tests.cluster.engine_ranks import BATCH, build, global_batch, method_config
from tests.conftest import NUM_CLASSES


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        pass


@pytest.fixture
def reduced(monkeypatch) -> list[int]:
    """Bytes of every all-reduce, in a process that takes itself for one of two."""
    sizes: list[int] = []

    def all_reduce(tensor: torch.Tensor, *args: object, **kwargs: object) -> Done:
        sizes.append(tensor.nbytes)
        return Done()

    class Sum:
        """How batch-norm sums over workers."""

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.nbytes)
            return 2 * x

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr("sepico.normalization.RankSum", Sum)
    return sizes


@pytest.mark.parametrize(
    ("method", "batch_norm"),
    [
        *((m, "sync") for m in ("distcl", "distcl masked", "distcl day-night", "source_only")),
        *((m, "frozen") for m in ("distcl", "distcl per stage")),
    ],
)
def test_a_step_all_reduces_what_a_dry_run_says(method, batch_norm, reduced):
    method_section = method_config(method, start=0)
    config = TrainConfig(**vars(method_section), engine=EngineConfig(batch_norm=batch_norm))
    network, teacher, contrast = build(method_section)
    parts = [network] if teacher is None else [network, teacher.network]
    for part in parts:
        set_batch_norm(part, batch_norm)
    step = AdaptationStep(config, network.normalize, teacher, contrast)
    for term in step.terms(network.train(), global_batch(0, range(BATCH)), 0):
        term.backward()
    expected = all_reduced_bytes(config, network)
    # The engine reduces the gradients.
    assert expected.pop("gradients") == sum(p.nbytes for p in network.parameters())
    assert sum(reduced) == sum(expected.values())


def test_without_the_regularizer_its_mean_is_not_reduced():
    config = TrainConfig(**vars(method_config("distcl", start=0)))
    network, _, _ = build(config)
    without = replace(config, contrast=ContrastConfig(regularizer_weight=0))
    saved = set(all_reduced_bytes(config, network)) - set(all_reduced_bytes(without, network))
    assert saved == {"regularizer"}


@pytest.mark.parametrize(
    ("stage", "workers", "bytes_per_parameter"),
    [(0, 2, 20), (1, 1, 24), (1, 2, 18), (2, 2, 18), (3, 1, 28), (3, 2, 16), (3, 8, 7)],
)
def test_model_states_shrink_with_stage_and_workers(stage, workers, bytes_per_parameter):
    bucket = model_state_bytes(0, stage, workers, teacher=True)
    assert bucket == (100_000_000 if stage else 0)
    size = model_state_bytes(1000, stage, workers, teacher=True) - bucket
    assert size == 1000 * bytes_per_parameter
    averages = 4000 / workers if stage == 3 else 4000
    assert model_state_bytes(1000, stage, workers, teacher=False) - bucket == size - averages


def test_data_in_files_are_checked_and_other_data_are_named(
    folder, write_dataset, tmp_path, capsys
):
    url = str(tmp_path / "shards")
    write_dataset(folder, open_storage(url, StorageConfig()))
    model = replace(method_config("distcl", start=0).model, num_classes=0)
    data = DataConfig(url, url, crop_height=32, crop_width=64, rcs_min_pixels=50)
    describe(TrainConfig(model=model, data=data))
    printed = capsys.readouterr().out
    assert "source            12 images, 6 steps an epoch" in printed
    assert "not checked" not in printed
    describe(TrainConfig(model=model, data=replace(data, target="s3://nowhere/night")))
    assert "labels: data.target not in files here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="smaller than the crop 64x64"):
        describe(TrainConfig(model=model, data=replace(data, crop_height=64)))


@pytest.mark.parametrize("checked", [describe, check_network])
def test_images_that_a_network_takes_no_whole_one_of_are_refused(
    checked, make_folder, write_dataset, tmp_path
):
    """The teacher's and the validation's; source_only has no teacher."""
    url = (tmp_path / "shards").as_uri()
    folder = make_folder(tmp_path / "data", count=4, size=(224, 320))
    write_dataset(folder, open_storage(url, StorageConfig()))
    model = method_config("distcl", start=0).model
    model = replace(model, num_classes=NUM_CLASSES, encoder="tu-swin_tiny_patch4_window7_224")
    data = DataConfig(url, url, crop_height=224, crop_width=224, rcs_min_pixels=50)
    config = TrainConfig(model=model, data=data)
    baseline = replace(config, method="source_only")
    checked(baseline)
    for refused in (config, replace(baseline, validation=ValidationConfig(url))):
        with pytest.raises(ValueError, match=f"takes no 320x224 images of {url}"):
            checked(refused)
