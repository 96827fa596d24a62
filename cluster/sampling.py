"""Position -> samples, a pure function: the same data on 1, 2 or 64 workers.

Slot s of step t has the position p = t * global_batch + s. What is drawn for it depends on
(seed, p) alone: `Philox` is a counter-based generator, so position p reads its random words
directly, without drawing those before it. Ranks do not occur in the computation. Hence, for any
number of workers n, whether or not it divides the global batch: rank r takes the slots r, r + n,
r + 2n, ..., these sets partition the slots, and the union over ranks is the same set of draws. A
resume at step t needs the integer t and nothing else.

Only raw Philox words are used (numpy guarantees them, unlike the streams of Generator methods),
so a run that resumes with another numpy sees the same samples. Nothing has the length of an
epoch: the target's order is computed place by place, the images of a class are bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Philox

from cluster.bitmap import Bitmap
from cluster.permutation import WORDS, permute

# Second word of the Philox key: independent streams from one seed.
SOURCE_STREAM, TARGET_STREAM = 0, 1


@dataclass(frozen=True)
class Draw:
    """What one slot of one step is made of.

    `source` and `target` are indices into the manifests, `rare_class` is the class the source
    was drawn for, and `seed` (63 bits) addresses everything else that is drawn for this slot.
    """

    source: int
    target: int
    rare_class: int
    seed: int


def rare_class_probabilities(pixel_counts: np.ndarray, temperature: float) -> np.ndarray:
    """softmax((1 - f_c) / temperature) over the classes that occur, 0 for the others.

    `pixel_counts` (C,) are the pixels of each class in the whole data set and f_c is their
    share. Returns (C,) float64. Raises ValueError if no pixel is labelled or temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"rcs_temperature {temperature} must be positive")
    counts = np.asarray(pixel_counts, np.float64)
    if counts.sum() <= 0:
        raise ValueError("no class has a labelled pixel: rare class sampling needs source labels")
    logits = np.where(counts > 0, (1 - counts / counts.sum()) / temperature, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Sampler:
    """Draws for every (step, slot): rare class sampling of the source, epochs of the target.

    Source: a class by `rare_class_probabilities`, then uniformly an image with more than
    `min_pixels` pixels of it. Raises ValueError for a class that occurs, but nowhere that often.
    Target: every image once an epoch of `target_size` positions, in an order of the epoch's own.
    """

    def __init__(
        self,
        source_pixel_counts: np.ndarray,  # (N, C) pixels of each class in each source image
        target_size: int,
        *,
        seed: int,
        global_batch: int,
        temperature: float,
        min_pixels: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} must lie in 0..2**64-1")
        if global_batch < 1 or target_size < 1:
            raise ValueError(
                f"global_batch {global_batch} and the number of target images {target_size} "
                "must be at least 1"
            )
        probabilities = rare_class_probabilities(source_pixel_counts.sum(axis=0), temperature)
        cumulative = np.cumsum(probabilities)
        self._cumulative = cumulative / cumulative[-1]  # ends at exactly 1, above every point
        self._images = [Bitmap(counts > min_pixels) for counts in source_pixel_counts.T]
        for rare_class, images in enumerate(self._images):
            if probabilities[rare_class] > 0 and not len(images):
                raise ValueError(
                    f"class {rare_class}: no image has more than {min_pixels} pixels of it"
                )
        self._target_size = target_size
        self._seed = seed
        self._global_batch = global_batch
        # A batch touches two epochs at most where they meet.
        self._epoch_words = lru_cache(maxsize=2)(self._draw_epoch_words)

    def draw(self, step: int, slot: int) -> Draw:
        """The draw of one slot, 0 <= slot < global_batch."""
        assert 0 <= slot < self._global_batch, slot
        position = step * self._global_batch + slot
        u, v, w = (int(x) for x in self._words(SOURCE_STREAM, position, 3))
        point = (u >> 11) * 2.0**-53  # the top 53 bits make a float in [0, 1)
        rare_class = int(np.searchsorted(self._cumulative, point, side="right"))
        images = self._images[rare_class]
        epoch, place = divmod(position, self._target_size)
        return Draw(
            source=images.select(v * len(images) >> 64),
            target=permute(place, self._target_size, self._epoch_words(epoch)),
            rare_class=rare_class,
            seed=w >> 1,
        )

    def _draw_epoch_words(self, epoch: int) -> list[int]:
        return self._words(TARGET_STREAM, epoch, WORDS).tolist()

    def _words(self, stream: int, address: int, count: int) -> np.ndarray:
        """(count,) uint64. The address sits above the word that counts along the stream."""
        key = np.array([self._seed, stream], np.uint64)
        return Philox(key=key, counter=np.array([0, address, 0, 0], np.uint64)).random_raw(count)
