"""Strong augmentation, ClassMix and the class-balanced crop, drawn per slot of the global batch."""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from sepico.config import AugmentationConfig, MICConfig, TeacherConfig
from sepico.randomness import slot_generator


def strong_augment(image: Tensor, seed: int, config: AugmentationConfig) -> Tensor:
    """Colour jitter and blur of one image (3, H, W) float32 on the 0..1 scale.

    The draws belong to the slot, so its source, target and mixed image get the same ones.
    """
    rng = slot_generator(seed, "strong")
    jitter, blur = rng.random(2)
    low, high = 1 - config.jitter_strength, 1 + config.jitter_strength
    brightness, contrast, saturation = rng.uniform(low, high, 3)
    hue = rng.uniform(-config.jitter_strength, config.jitter_strength)
    order = rng.permutation(4)
    sigma = rng.uniform(*config.blur_sigma)
    if jitter < config.jitter_probability:
        changes = (
            lambda x: tv.adjust_brightness(x, brightness),
            lambda x: tv.adjust_contrast(x, contrast),
            lambda x: tv.adjust_saturation(x, saturation),
            # adjust_hue takes at most half a turn of the colour wheel.
            lambda x: tv.adjust_hue(x, max(-0.5, min(0.5, hue))),
        )
        for i in order:
            image = changes[i](image)
    if blur < config.blur_probability:
        # Beyond 4 sigma the kernel adds nothing.
        image = tv.gaussian_blur(image, 2 * math.ceil(4 * sigma) + 1, sigma)
    return image


def draw_mix_classes(labels: Tensor, seed: int) -> Tensor:
    """Half (rounded up) of the classes in one label map, for `class_mix_mask`.

    Drawn per image from the classes it holds, ignored pixels never: the authors draw from the
    classes of the whole batch, ignore value included, which a batch spread over workers cannot.
    """
    present = torch.unique(labels)
    present = present[present != 255]
    rng = slot_generator(seed, "classmix")
    chosen = rng.permutation(len(present))[: (len(present) + 1) // 2]
    return present[torch.from_numpy(chosen).to(present.device)]


def class_mix_mask(labels: Tensor, chosen: list[Tensor]) -> Tensor:
    """(B, 1, H, W) labels, one tensor of classes an image -> (B, 1, H, W), 1 where chosen."""
    return torch.stack(
        [torch.isin(label, classes) for label, classes in zip(labels, chosen, strict=True)]
    ).to(labels.dtype)


def block_mask(size: tuple[int, int], seed: int, config: MICConfig) -> Tensor:
    """(H, W) bool, True in the masked blocks of one image; the last ones may be cut by the edge."""
    rng = slot_generator(seed, "mask")
    block = config.block_size
    blocks = rng.random([math.ceil(side / block) for side in size]) < config.mask_ratio
    mask = torch.from_numpy(blocks).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return mask[: size[0], : size[1]]


def draw_boxes(
    size: tuple[int, int], crop: tuple[int, int], count: int, rng: np.random.Generator
) -> Tensor:
    """(count, 4) int64 boxes y1 y2 x1 x2 of `crop` (h, w) inside an image of `size` (H, W)."""
    top = rng.integers(0, size[0] - crop[0] + 1, count)
    left = rng.integers(0, size[1] - crop[1] + 1, count)
    return torch.from_numpy(np.stack([top, top + crop[0], left, left + crop[1]], 1))


def class_balanced_crop(labels: Tensor, boxes: Tensor, *, max_ratio: float) -> tuple[int, Tensor]:
    """Score each box of a label map (H, W) and pick the first best: (index, scores (K,) float32).

    The score is the sum over classes with more than one pixel of log(pixels); it is 0 for a box
    of one class, or where the largest class holds a share of `max_ratio` or more. The sums are the
    authors' to the bit, float32, so that boxes which tie there tie here.
    """
    pixels = [
        torch.bincount(labels[y1:y2, x1:x2].flatten(), minlength=256)
        for y1, y2, x1, x2 in boxes.tolist()
    ]
    scores = []
    for counts in torch.stack(pixels).cpu():
        counts[255] = 0
        counts = counts[counts > 0]
        balanced = len(counts) > 1 and counts.max() / counts.sum() < max_ratio
        scores.append(float(counts[counts > 1].log().sum()) if balanced else 0.0)
    scores = torch.tensor(scores)
    return int(scores.argmax()), scores


def crop_target(
    pseudo_label: Tensor, seed: int, crop: tuple[int, int], config: TeacherConfig
) -> tuple[slice, slice]:
    """Rows and columns of the class-balanced crop of one pseudo-labelled target image (H, W)."""
    rng = slot_generator(seed, "target-crop")
    boxes = draw_boxes(tuple(pseudo_label.shape), crop, config.crop_tries, rng)
    best, _ = class_balanced_crop(pseudo_label, boxes, max_ratio=config.crop_max_ratio)
    y1, y2, x1, x2 = boxes[best].tolist()
    return slice(y1, y2), slice(x1, x2)
