"""Every shipped preset is a valid run; a dry run says what it would be."""

from importlib.resources import files

import pytest

from cluster.config import TrainConfig
from cluster.dry_run import describe
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


# By hand. ResNet-101-v1c without its classifier has 42,519,392 parameters, DeepLab-v2's head
# 4 (9 * 2048 * 19 + 19), the projection 2048 * 2048 + 2048 * 512 and 2 (2048 + 512) of batch-norm.
# MiT-B5 has 81,443,008, DAFormer's head embeds 1024 * 256 + 4 * 256, fuses by 4 * 1024 * 256 +
# 3 * 9 * 1024 + 9 * 1024 * 256 and 2 (4 * 256 + 3 * 1024 + 256) of batch-norm, classifies by
# 257 * 19, and the projection is 1024 * 256 + 256 * 512 and 2 (256 + 512).
PARAMETERS = {"deeplabv2": 49_168_300, "daformer": 85_550_035}
STEPS_AN_EPOCH = {
    "gta2cityscapes": ("12,483", "1,488"),
    "synthia2cityscapes": ("4,700", "1,488"),
    "cityscapes2darkzurich": ("1,488", "1,208"),
}


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
    night = task == "cityscapes2darkzurich"
    assert config.seed == (42 if night else 76)
    contrast, teacher, data = config.contrast, config.teacher, config.data
    assert contrast.temperature == 100
    assert (contrast.weight, contrast.regularizer_weight) == (1, 1)
    assert (contrast.start, contrast.bank_length) == (3000, 200)
    assert (teacher.threshold, teacher.ema_alpha) == (0.968, 0.999)
    assert (teacher.ignore_top, teacher.ignore_bottom) == ((0, 0) if night else (15, 120))
    assert (teacher.crop_tries, teacher.crop_max_ratio) == (10, 0.75)
    assert (teacher.day_night, teacher.day_ratio) == (night, 0.8)
    assert teacher.class_weight_std == (0.05 if night else 0)
    assert (data.crop_height, data.crop_width) == (640, 640)
    assert (data.crop_tries, data.crop_max_ratio) == (10, 0.75)
    assert (data.rcs_temperature, data.rcs_min_pixels, data.rcs_crop_ratio) == (0.01, 3000, 0.5)
    optimization = config.optimization
    assert optimization.iterations == (60000 if night else 40000)
    assert (optimization.global_batch, optimization.reference_batch) == (2, 2)
    assert (optimization.lr, optimization.head_lr_multiplier) == (6e-5, 10)
    assert (optimization.betas, optimization.weight_decay) == ((0.9, 0.999), 0.01)
    assert (optimization.warmup, optimization.warmup_ratio, optimization.power) == (1500, 1e-6, 1)
    model = config.model
    deep = head == "deeplabv2"
    encoder = ("tu-resnet101c", 8) if deep else ("mit_b5", 32)
    assert (model.encoder, model.output_stride) == encoder
    assert model.projection_stages == ((3,) if deep else (0, 1, 2, 3))
    assert (model.projection_channels, model.num_classes) == (512, 19)
    text = files("jobs").joinpath("presets", f"{name}.yaml").read_text()
    assert f"Published mIoU {miou}" in text
    assert f"--config {name}" in text


def test_a_dry_run_prints_sizes_and_names_what_it_has_no_data_for(capsys):
    config = load("demo")
    config.model.num_classes = 9
    describe(config)
    printed = capsys.readouterr().out
    assert "300 of 8 images" in printed
    assert "no manifest" in printed
    assert f"statistics {8 * (9 * (2 * 32 + 1) + 1 + 1):>14,}" in printed


def test_a_dry_run_without_classes_says_which_key_to_give():
    with pytest.raises(ValueError, match=r"model\.num_classes"):
        describe(load("demo"))


@pytest.mark.parametrize(
    ("task", "head", "method"),
    [
        pytest.param(*experiment[:3], marks=() if experiment[2] == "distcl" else pytest.mark.slow)
        for experiment in EXPERIMENTS
    ],
)
def test_a_published_experiment_dry_runs_without_its_data(task, head, method, capsys):
    describe(load(f"{task}_{head}_{method}"))
    printed = capsys.readouterr().out
    parameters = PARAMETERS[head]
    assert f"method            {method}, 19 classes, crops 640x640" in printed
    assert f"in all {parameters:>28,}" in printed
    # One worker alone replicates, 20 bytes a parameter; ZeRO 1 takes 24 and a bucket of 100 MB.
    assert f"0: {20 * parameters / 2**20:,.0f}  <- engine.zero_stage 1, of one worker" in printed
    assert f"1: {(24 * parameters + 1e8) / 2**20:,.0f}\n" in printed
    assert f"gradients  {4 * parameters:>14,}" in printed
    assert f"statistics {8 * (19 * (2 * 512 + 1) + 1 + 1):>14,}" in printed
    source, target = STEPS_AN_EPOCH[task]
    assert f"images, {source} steps an epoch (no manifest: data.source_images)" in printed
    assert f"images, {target} steps an epoch (no manifest: data.target_images)" in printed
    references = ", references" if task == "cityscapes2darkzurich" else ""
    assert f"labels{references}: data.source and data.target not in files here" in printed
