"""SYNTHIA -> Cityscapes: a source that lacks some of its taxonomy's classes trains like another."""

import json
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from cluster.config import TrainConfig, ValidationConfig
from cluster.data import DataConfig
from cluster.datasets import read_taxonomy
from cluster.layouts import DATASETS
from cluster.loader import TrainLoader
from cluster.storage import StorageConfig, open_storage
from cluster.training import resolve
from sepico.step import AdaptationStep, StepBatch
from sepico.taxonomies import CITYSCAPES_19
from tests.cluster.engine_ranks import build, method_config
from tests.conftest import NUM_CLASSES

PRESENT, CLASSES = NUM_CLASSES, CITYSCAPES_19.num_classes


@pytest.fixture(scope="module")
def urls(folder, write_dataset, tmp_path_factory) -> dict[str, str]:
    """Shards with the 19 classes of Cityscapes, of which the labels hold the first five."""
    root = tmp_path_factory.mktemp("absent")
    images = shutil.copytree(folder, root / "images")
    (images / "classes.json").write_text(json.dumps(CITYSCAPES_19.to_dict()))
    for name, labels in (("source", True), ("target", False)):
        write_dataset(images, open_storage(str(root / name), StorageConfig()), labels=labels)
    return {"source": str(root / "source"), "target": str(root / "target")}


def data(urls: dict[str, str]) -> DataConfig:
    return DataConfig(**urls, crop_height=32, crop_width=64, rcs_min_pixels=60)


def test_synthia_and_cityscapes_are_ingested_with_the_same_classes(tmp_path):
    for name in ("synthia", "cityscapes"):
        assert read_taxonomy(tmp_path, DATASETS[name], None) == CITYSCAPES_19


def test_the_run_is_accepted_with_its_validation_set(urls, tmp_path):
    config = TrainConfig(
        data=data(urls), validation=ValidationConfig(data=urls["source"]), runs=str(tmp_path)
    )
    assert resolve(config).model.num_classes == CLASSES


@pytest.mark.parametrize("method", ["distcl", "bankcl", "protocl"])
def test_two_steps_are_finite_and_absent_classes_keep_zero_statistics(method, urls):
    config = method_config(method, start=0)
    config = replace(config, model=replace(config.model, num_classes=CLASSES))
    network, teacher, contrast = build(config)
    step = AdaptationStep(config, network.normalize, teacher, contrast)
    loader = TrainLoader(
        data(urls), StorageConfig(), seed=3, global_batch=4, rank=0, world_size=1, start_step=0
    )
    with closing(loader):
        batches = iter(loader)
        for t in range(2):
            batch = next(batches)
            images = (batch.source_image.float() / 255, batch.target_image.float() / 255)
            step_batch = StepBatch(batch.seeds, images[0], batch.source_label, images[1])
            for term in step.terms(network, step_batch, t):
                assert torch.isfinite(term)
                term.backward()
    # The untrained teacher labels target pixels with classes that the source does not have.
    assert (step.pictures["pseudo_label"] >= PRESENT).any()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    statistics = contrast.statistics[0]
    assert (statistics.count[:PRESENT] > 0).any()
    assert not statistics.count[PRESENT:].any()
    assert not statistics.mean[PRESENT:].any() and not statistics.variance[PRESENT:].any()
