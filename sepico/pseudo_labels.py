"""From the teacher's answers to the labels that the student trains on in the target domain."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepico import augment
from sepico.batch import StepBatch
from sepico.config import TeacherConfig
from sepico.teacher import Teacher, fuse_day_night, trust_mask


@dataclass
class LabelledCrop:
    """A target crop with its pseudo-label and the pixels of it that carry a vote."""

    image: Tensor  # (B, 3, h, w)
    label: Tensor  # (B, h, w) int64
    trusted_label: Tensor  # (B, 1, h, w) int64, ignored where untrusted
    confident: Tensor  # () number of pixels above the threshold
    score: Tensor  # () mean of the labels' scores
    truth: Tensor | None  # (B, h, w) int64, for analysis
    reference: Tensor | None  # (B, 3, h, w), the same box of the day image


class PseudoLabeller:
    """Pseudo-label -> class-balanced crop -> pseudo-label again.

    `class_weight` (C,), if any, multiplies the probabilities that the label is chosen by.
    """

    def __init__(
        self,
        config: TeacherConfig,
        normalize: Callable[[Tensor], Tensor],
        teacher: Teacher,
        class_weight: Tensor | None,
    ) -> None:
        self._config, self._normalize = config, normalize
        self._teacher, self._class_weight = teacher, class_weight

    def _label(self, image: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels (B, H, W) int64 of target images (B, 3, H, W), and their scores (B, H, W).

        The score is the label's probability. With `teacher.day_night` the day image of the same
        place has its say, and the score is, as the authors have it, the weighted one.
        """
        config = self._config
        if config.day_night:
            day = self._teacher.probabilities(self._normalize(reference))
            night = self._teacher.probabilities(self._normalize(image))
            scores = fuse_day_night(
                day, night, class_weight=self._class_weight, day_ratio=config.day_ratio
            )
        else:
            scores = self._teacher.probabilities(self._normalize(image))
            if self._class_weight is not None:
                # Weights may be far from 1 here: a threshold on weighted scores would trust rare
                # classes alone.
                label = (scores * self._class_weight.view(-1, 1, 1)).argmax(1)
                return label, scores.gather(1, label[:, None])[:, 0]
        score, label = scores.max(1)
        return label, score

    def __call__(self, batch: StepBatch) -> LabelledCrop:
        """Label the whole image, crop where classes balance, label the crop again."""
        config = self._config
        whole, _ = self._label(batch.target_image, batch.target_reference)
        size = tuple(batch.source_image.shape[-2:])
        boxes = [
            augment.crop_target(label, seed, size, config)
            for label, seed in zip(whole, batch.seeds, strict=True)
        ]

        def crop(planes: Tensor | None) -> Tensor | None:
            if planes is None:
                return None
            return torch.stack(
                [plane[:, y, x] for plane, (y, x) in zip(planes, boxes, strict=True)]
            )

        image, truth = crop(batch.target_image), crop(batch.target_label)
        reference = crop(batch.target_reference)
        label, score = self._label(image, reference)
        trusted = trust_mask(*size, config.ignore_top, config.ignore_bottom).to(label.device) > 0
        return LabelledCrop(
            image,
            label,
            torch.where(trusted, label, 255)[:, None],
            (score >= config.threshold).sum(),
            score.mean(),
            None if truth is None else truth[:, 0],
            reference,
        )
