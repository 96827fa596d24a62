"""Masked image consistency: its masks, and the loss term it adds to a step."""

from dataclasses import replace

import pytest
import torch

from sepico import augment
from sepico.config import MICConfig
from sepico.step import AdaptationStep
from tests.cluster.engine_ranks import BATCH, build, global_batch, method_config


def test_masked_share_is_the_ratio():
    config = MICConfig(mask_ratio=0.7, block_size=64)
    masks = torch.stack([augment.block_mask((640, 640), seed, config) for seed in range(50)])
    assert masks.dtype == torch.bool
    assert masks.float().mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_or_everything_can_be_masked(ratio):
    assert (augment.block_mask((9, 9), 3, MICConfig(mask_ratio=ratio, block_size=4)) == ratio).all()


def test_blocks_are_whole_and_cut_at_the_edge_only():
    config = MICConfig(mask_ratio=0.5, block_size=8)
    mask = augment.block_mask((20, 30), 5, config)
    assert mask.shape == (20, 30)
    for y in range(0, 20, 8):
        for x in range(0, 30, 8):
            assert mask[y : y + 8, x : x + 8].unique().numel() == 1
    assert mask.unique().numel() == 2


def test_a_slot_has_one_mask():
    config = MICConfig()
    first = augment.block_mask((256, 256), 7, config)
    assert torch.equal(first, augment.block_mask((256, 256), 7, config))
    assert not torch.equal(first, augment.block_mask((256, 256), 8, config))


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -1.0), ("mask_ratio", 1.5), ("block_size", 0)]
)
def test_a_value_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"mic\.{field} is"):
        MICConfig(**{field: value})


def one_step(mic: MICConfig) -> tuple[list[float], list[torch.Tensor], AdaptationStep]:
    """Loss terms of one step with contrast, the images the student saw, and the step."""
    config = replace(method_config("distcl", start=0), mic=mic)
    network, teacher, contrast = build(config)
    seen = []

    def student(images, **options):
        seen.append(images)
        return network(images, **options)

    step = AdaptationStep(config, network.normalize, teacher, contrast)
    terms = step.terms(student, global_batch(0, range(BATCH)), 0)
    return [term.item() for term in terms], seen, step


def test_weight_zero_makes_no_pass_and_another_weight_changes_no_other_term():
    plain, plain_images, plain_step = one_step(MICConfig())
    masked, images, step = one_step(MICConfig(weight=0.5))
    assert (len(plain), len(plain_images)) == (3, 3)
    assert "mic_ce" not in plain_step.metrics
    assert masked[:3] == plain
    assert (len(masked), len(images)) == (4, 4)
    assert masked[3] == pytest.approx(0.5 * step.metrics["mic_ce"].item())
    assert masked[3] > 0


def test_the_student_sees_the_strong_target_crop_without_the_masked_blocks():
    mic = MICConfig(weight=1.0, block_size=20)
    _, images, _ = one_step(mic)
    target, masked = images[1], images[3]
    size, seeds = tuple(target.shape[-2:]), global_batch(0, range(BATCH)).seeds
    masks = torch.stack([augment.block_mask(size, seed, mic) for seed in seeds])[:, None]
    assert torch.equal(masked, target.masked_fill(masks, 0))
