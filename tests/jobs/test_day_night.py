"""Day to night as a person runs it: ingest with reference images, train on two workers."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

from cluster.config import TrainConfig
from cluster.data import DataConfig
from cluster.ingest import IngestConfig, ingest
from cluster.loader import TrainLoader
from cluster.storage import StorageConfig
from sepico.config import ContrastConfig, ModelConfig, OptimizationConfig, TeacherConfig
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher, class_weights
from tests.jobs.training import TINY, metrics, run_job

STEPS = 3


@pytest.fixture(scope="module")
def data(make_folder, joined, tmp_path_factory) -> dict[str, str]:
    """Labelled day images and unlabelled night images with day images of the same places."""
    root = tmp_path_factory.mktemp("day_night")
    make_folder(root / "day")
    make_folder(root / "places", seed=1)
    (root / "night").mkdir()
    (root / "places/images").rename(root / "night/references")
    (root / "night/images").mkdir()
    for i in range(12):
        dark = torch.randint(0, 60, (3, 48, 64), generator=torch.Generator().manual_seed(i))
        write_jpeg(dark.byte(), str(root / f"night/images/frame{i:03d}.jpg"))
    for name, labels in (("day", True), ("night", False)):
        to = str(root / f"{name}_shards")
        ingest(IngestConfig(str(root / name), to, classes="cityscapes19", labels=labels))
    return {"data.source": str(root / "day_shards"), "data.target": str(root / "night_shards")}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """The folder of a finished run of two workers."""
    runs = tmp_path_factory.mktemp("runs")
    options = {
        **TINY,
        **data,
        "validation.data": data["data.source"],
        "teacher.day_night": "true",
        "teacher.class_weight_std": "0.05",
        "teacher.threshold": "0.1",
        "contrast.start": "1",
        "optimization.iterations": str(STEPS),
        "runs": str(runs),
        "run": "night",
    }
    job = run_job("jobs.train", options)
    assert job.returncode == 0, job.stderr
    return runs / "night"


def first_step(run: Path, **changes) -> dict[str, float]:
    """Metrics of the run's first step, computed in this process with the whole batch.

    `changes` are made to the run's teacher.
    """
    wanted = json.loads((run / "config.json").read_text())
    config = TrainConfig(
        model=ModelConfig(**wanted["model"]),
        contrast=ContrastConfig(**wanted["contrast"]),
        teacher=replace(TeacherConfig(**wanted["teacher"]), **changes),
        data=DataConfig(**wanted["data"]),
        optimization=OptimizationConfig(**wanted["optimization"]),
    )
    torch.manual_seed(wanted["seed"])
    network = build_segmentor(config.model)
    teacher = Teacher(build_segmentor(config.model))
    teacher.network.load_state_dict(network.state_dict())
    loader = TrainLoader(
        config.data,
        StorageConfig(),
        seed=wanted["seed"],
        global_batch=wanted["optimization"]["global_batch"],
        rank=0,
        world_size=1,
        references=config.teacher.day_night,
    )
    with closing(loader):
        batch = next(iter(loader))
    counts = torch.from_numpy(loader.source.pixel_counts.sum(axis=0))
    weights = class_weights(counts, config.teacher.class_weight_std)
    step = AdaptationStep(config, network.normalize, teacher, PixelContrast(config), weights)
    source, target = batch.source_image.float() / 255, batch.target_image.float() / 255
    reference = batch.target_reference.float() / 255 if config.teacher.day_night else None
    images = StepBatch(batch.seeds, source, batch.source_label, target, None, reference)
    for _ in step.terms(network.train(), images, 0):
        pass
    return {name: value.item() for name, value in step.metrics.items()}


@pytest.mark.slow
def test_two_workers_train_on_labels_that_the_day_images_helped_to_find(run):
    lines = [line for line in metrics(run) if "mix_ce" in line]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    fused, night = first_step(run), first_step(run, day_night=False, class_weight_std=0.0)
    assert 0.05 < fused["confident_share"] < 0.95
    for name in ("source_ce", "mix_ce", "confident_share"):
        assert lines[0][name] == pytest.approx(fused[name], rel=2e-3), name
        assert lines[0][name] != pytest.approx(night[name], rel=1e-2), name


def test_validation_reports_the_classes_of_synthia_too(run):
    (line,) = [line for line in metrics(run) if "student_miou" in line]
    keys = {f"{name}_miou{of}" for name in ("student", "teacher") for of in ("", "_16", "_13")}
    assert keys == {key for key in line if "_miou" in key}
