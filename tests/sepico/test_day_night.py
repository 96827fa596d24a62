"""Pseudo-labels of night images that day images of the same places help to find."""

import copy

import pytest
import torch

from sepico import augment, losses
from sepico.config import (
    AugmentationConfig,
    ContrastConfig,
    MethodConfig,
    ModelConfig,
    OptimizationConfig,
    TeacherConfig,
)
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher, class_weights, fuse_day_night

SEEDS = [3, 4, 5]
WEIGHT = torch.linspace(0.9, 1.1, 19)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    image, reference = (
        torch.rand(3, 3, 6, 8, generator=generator)
        .repeat_interleave(24, 2)
        .repeat_interleave(24, 3)
        for _ in range(2)
    )
    source = torch.rand(3, 3, 96, 96, generator=generator)
    label = torch.randint(0, 19, (3, 1, 96, 96), generator=generator)
    return StepBatch(SEEDS, source, label, image, target_reference=reference)


def adaptation_step(day_night, day_ratio=0.8, class_weight_std=0.05):
    torch.manual_seed(0)
    config = MethodConfig(
        model=ModelConfig(
            encoder="tu-test_efficientnet",
            encoder_weights=None,
            head_channels=16,
            head_dilations=(1,),
            dropout=0.0,
            projection_channels=16,
            num_classes=19,
        ),
        augmentation=AugmentationConfig(jitter_probability=0.0, blur_probability=0.0),
        contrast=ContrastConfig(start=10),
        optimization=OptimizationConfig(global_batch=len(SEEDS), reference_batch=len(SEEDS)),
        # Low enough that an untrained network is sure of some pixels, and not of all.
        teacher=TeacherConfig(
            threshold=0.09,
            ignore_top=0,
            ignore_bottom=0,
            crop_max_ratio=1.0,
            day_night=day_night,
            day_ratio=day_ratio,
            class_weight_std=class_weight_std,
        ),
    )
    network = build_segmentor(config.model)
    teacher = Teacher(copy.deepcopy(network))
    step = AdaptationStep(config, network.normalize, teacher, PixelContrast(config), WEIGHT)
    return step, network


def run(step, network, batch):
    """One step; returns the pictures and the share of confident pixels."""
    for term in step.terms(network.train(), batch, 0):
        assert term.isfinite()
    return step.pictures, step.metrics["confident_share"]


def fused_scores(step, night, day, day_ratio=0.8):
    probabilities = [step.teacher.probabilities(step.normalize(image)) for image in (day, night)]
    return fuse_day_night(*probabilities, class_weight=WEIGHT, day_ratio=day_ratio)


@pytest.mark.parametrize("day_ratio", [0.8, 0.3])
def test_the_label_of_a_crop_is_that_of_the_fused_scores(batch, day_ratio):
    step, network = adaptation_step(day_night=True, day_ratio=day_ratio)
    pictures, confident_share = run(step, network, batch)
    score, label = fused_scores(step, pictures["target"], pictures["reference"], day_ratio).max(1)
    assert torch.equal(pictures["pseudo_label"], label)
    expected = (score >= 0.09).float().mean()
    assert 0.1 < expected < 0.9
    assert confident_share.item() == pytest.approx(expected.item())
    night = step.teacher.probabilities(step.normalize(pictures["target"]))
    assert not torch.equal(label, night.argmax(1))


def test_the_fused_label_of_the_whole_image_places_one_box_in_both_images(batch):
    step, network = adaptation_step(day_night=True)
    pictures, _ = run(step, network, batch)
    whole = fused_scores(step, batch.target_image, batch.target_reference).argmax(1)
    for i, seed in enumerate(SEEDS):
        y, x = augment.crop_target(whole[i], seed, (96, 96), step.config.teacher)
        assert torch.equal(pictures["target"][i], batch.target_image[i, :, y, x])
        assert torch.equal(pictures["reference"][i], batch.target_reference[i, :, y, x])


@pytest.mark.parametrize(("class_weight_std", "weight"), [(0.0, torch.ones(19)), (0.05, WEIGHT)])
def test_without_day_night_the_target_image_alone_gives_the_label(batch, class_weight_std, weight):
    step, network = adaptation_step(day_night=False, class_weight_std=class_weight_std)
    pictures, _ = run(step, network, batch)
    own = step.teacher.probabilities(step.normalize(pictures["target"]))
    assert torch.equal(pictures["pseudo_label"], (own * weight[:, None, None]).argmax(1))
    assert not torch.equal(own.argmax(1), (own * WEIGHT[:, None, None]).argmax(1))


@pytest.mark.parametrize(("class_weight_std", "class_weight"), [(0.0, None), (0.05, WEIGHT)])
def test_class_weights_multiply_the_cross_entropies(batch, class_weight_std, class_weight):
    step, network = adaptation_step(day_night=False, class_weight_std=class_weight_std)
    pictures, confident_share = run(step, network, batch)
    assert 0.1 < confident_share < 0.9
    for name, image, label, weight in (
        ("source_ce", batch.source_image, batch.source_label, None),
        ("mix_ce", pictures["mix"], pictures["mixed_label"][:, None], pictures["weight"]),
    ):
        logits, _ = network(step.normalize(image), projections=False)
        expected = losses.cross_entropy(logits, label, weight, class_weight=class_weight)
        assert step.metrics[name].item() == pytest.approx(expected.item(), rel=1e-6), name


def test_float64_probabilities_are_fused_in_float64():
    day, night = torch.rand(2, 1, 19, 2, 3, dtype=torch.float64)
    fused = fuse_day_night(day, night, day_ratio=0.7)
    assert fused.dtype == torch.float64
    road = torch.where(day > 0.4, 0.7 * day + 0.3 * night, 0.3 * day + 0.7 * night)[:, 0]
    assert torch.allclose(fused[:, 0], road, rtol=1e-12)
    assert torch.equal(fused[:, 5], night[:, 5])  # a pole does not stand where it stood


NIGHT = torch.rand(2, 19, 2, 3)


@pytest.mark.parametrize(
    ("day", "night", "weight", "named"),
    [
        (NIGHT[:, :16], NIGHT[:, :16], None, "night_probs has shape"),
        (NIGHT[:, :10], NIGHT[:, :10], None, "night_probs has shape"),
        (NIGHT[:, :16], NIGHT, None, "day_probs has shape"),
        (NIGHT[:1], NIGHT, None, "day_probs has shape"),
        (NIGHT[..., :1], NIGHT, None, "day_probs has shape"),
        (NIGHT, NIGHT, WEIGHT[:16], "class_weight has shape"),
    ],
)
def test_scores_of_other_classes_or_sizes_are_not_fused(day, night, weight, named):
    with pytest.raises(ValueError, match=named):
        fuse_day_night(day, night, class_weight=weight)


def test_class_weights_fall_with_the_logarithm_of_the_frequency():
    # Logarithms 1, 2 and 3 to base 10: mean 2, sample standard deviation 1.
    weights = class_weights(torch.tensor([10, 0, 100, 1000]), 0.05)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1.05, 1.0, 1.0, 0.95])


def test_class_weights_of_cityscapes_are_those_of_its_published_frequencies():
    frequencies = torch.tensor([
        0.36869696, 0.06084986, 0.22824049, 0.00655399, 0.00877272, 0.01227341, 0.00207795,
        0.0055127, 0.15928651, 0.01157818, 0.04018982, 0.01218957, 0.00135122, 0.06994545,
        0.00267456, 0.00235192, 0.00232904, 0.00098658, 0.00413907,
    ])  # fmt: skip
    weights = class_weights((frequencies * 1e8).long(), 0.05)
    assert weights.argmin() == 0 and weights.argmax() == 17  # road, motorcycle
    assert weights[[0, 17]].tolist() == pytest.approx([0.904138, 1.068882], abs=1e-5)
    assert weights.std().item() == pytest.approx(0.05, rel=1e-4)


def test_classes_of_one_frequency_weigh_the_same():
    assert class_weights(torch.tensor([7, 7, 0]), 0.05).tolist() == [1, 1, 1]
    # The mean of equal logarithms is not each of them to the last bit.
    assert class_weights(torch.tensor([6, 6, 6]), 0.16).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("key", "value"), [("day_ratio", 1.2), ("class_weight_std", -0.1)])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"teacher.{key} is {value}"):
        TeacherConfig(**{key: value})
