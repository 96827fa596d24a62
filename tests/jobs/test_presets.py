"""Every shipped preset is a valid run; a dry run says what it would be."""

from importlib.resources import files

import pytest

from cluster.config import TrainConfig
from cluster.dry_run import describe, model_state_bytes
from jobs.command_line import parse, presets

TASKS = ("gta2cityscapes", "synthia2cityscapes", "cityscapes2darkzurich")
# ProtoCL, BankCL, DistCL as published (SePiCo, TPAMI 2023).
PUBLISHED = {
    ("gta2cityscapes", "deeplabv2"): (58.8, 59.8, 61.0),
    ("gta2cityscapes", "daformer"): (68.5, 68.7, 70.3),
    ("synthia2cityscapes", "deeplabv2"): (56.8, 57.4, 58.1),
    ("synthia2cityscapes", "daformer"): (62.9, 63.3, 64.3),
    ("cityscapes2darkzurich", "deeplabv2"): (42.6, 44.1, 45.4),
    ("cityscapes2darkzurich", "daformer"): (52.7, 53.3, 54.2),
}
EXPERIMENTS = [
    (task, head, method, miou)
    for (task, head), mious in PUBLISHED.items()
    for method, miou in zip(("protocl", "bankcl", "distcl"), mious, strict=True)
]


def load(name: str) -> TrainConfig:
    return parse(TrainConfig, ["--config", name])


def test_the_presets_are_the_published_experiments_and_two_small_ones():
    names = {f"{task}_{head}_{method}" for task, head, method, _ in EXPERIMENTS}
    assert set(presets()) == names | {"demo", "camvid_day2dusk"}


@pytest.mark.parametrize(("task", "head", "method", "miou"), EXPERIMENTS)
def test_a_published_experiment_states_its_values(task, head, method, miou):
    name = f"{task}_{head}_{method}"
    config = load(name)
    assert (config.method, config.model.head) == (method, head)
    assert config.contrast.temperature == 100
    assert config.teacher.day_night == (task == "cityscapes2darkzurich")
    assert config.optimization.iterations == (60000 if config.teacher.day_night else 40000)
    text = files("jobs").joinpath("presets", f"{name}.yaml").read_text()
    assert f"Published mIoU {miou}" in text
    assert f"--config {name}" in text


def test_a_dry_run_prints_sizes_and_names_what_it_has_no_data_for(capsys):
    config = load("demo")
    config.model.num_classes = 9
    describe(config)
    printed = capsys.readouterr().out
    assert "380 of 8 images" in printed
    assert "no manifest" in printed
    assert f"statistics {8 * (9 * (2 * 32 + 1) + 1 + 1):>14,}" in printed


def test_a_dry_run_without_classes_says_which_key_to_give():
    with pytest.raises(ValueError, match=r"model\.num_classes"):
        describe(load("demo"))


@pytest.mark.parametrize(
    ("stage", "workers", "bytes_per_parameter"),
    [(0, 4, 16), (1, 4, 8 + 3), (2, 4, 4 + 4), (3, 4, 5), (3, 1, 20)],
)
def test_model_states_shrink_with_the_stage(stage, workers, bytes_per_parameter):
    size = model_state_bytes(1000, stage, workers, teacher=False)
    assert size == 1000 * bytes_per_parameter
    assert model_state_bytes(1000, stage, workers, teacher=True) == size + 4000
