"""What is drawn per sample on the way in: the source crop and the flips, as in the paper.

A source crop is drawn again while its largest class takes too much of it, and then while it
holds too little of the class that the image was drawn for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.random import Generator

RARE_CLASS_TRIES = 10


def crop_box(
    label: np.ndarray,
    size: tuple[int, int],
    below: Callable[[int], int],
    *,
    max_ratio: float,
    tries: int,
    ignore_index: int,
) -> tuple[int, int, int, int]:
    """The first random box (y1, y2, x1, x2) with several classes, none of max_ratio or more.

    With a ratio of 1 or more the first box, whatever it holds.

    `label` (H, W) uint8, `size` (h, w) of the box; `below(n)` draws an integer in 0..n-1. Ignored
    pixels count for nothing. After `tries` boxes that fail, one more is drawn and taken as it is.
    """
    for _ in range(tries):
        y1, y2, x1, x2 = box = _random_box(label.shape, size, below)
        counts = np.bincount(label[y1:y2, x1:x2].ravel(), minlength=256)
        counts[ignore_index] = 0
        mixed = np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_ratio
        if mixed or max_ratio >= 1:
            return box
    return _random_box(label.shape, size, below)


def rare_class_crop(
    label: np.ndarray,
    size: tuple[int, int],
    generator: Generator,
    *,
    rare_class: int,
    min_pixels: float,
    max_ratio: float,
    tries: int,
    ignore_index: int,
) -> tuple[int, int, int, int]:
    """A `crop_box`, drawn again up to 10 times until it holds > min_pixels of `rare_class`."""
    for _ in range(1 + RARE_CLASS_TRIES):
        y1, y2, x1, x2 = box = crop_box(
            label,
            size,
            lambda n: int(generator.integers(n)),
            max_ratio=max_ratio,
            tries=tries,
            ignore_index=ignore_index,
        )
        if np.count_nonzero(label[y1:y2, x1:x2] == rare_class) > min_pixels:
            break
    return box


def maybe_flip(
    generator: Generator, probability: float, *planes: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Mirror all of the (..., H, W) uint8 `planes` left to right, or none; contiguous."""
    step = -1 if generator.random() < probability else 1
    # One copy mirrors and makes planes of the decoder's interleaved pixels: numpy's takes half the
    # time of torch's.
    return [
        None
        if plane is None
        else torch.from_numpy(np.ascontiguousarray(plane.numpy()[..., ::step]))
        for plane in planes
    ]


def _random_box(
    shape: tuple[int, ...], size: tuple[int, int], below: Callable[[int], int]
) -> tuple[int, int, int, int]:
    y = below(shape[0] - size[0] + 1)
    x = below(shape[1] - size[1] + 1)
    return y, y + size[0], x, x + size[1]
