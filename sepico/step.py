"""One step of the method: a batch -> its loss terms, in order.

    terms = AdaptationStep(...).terms(student, batch, step)
    for term in terms: backward(term)          # one graph alive at a time
    optimiser step; teacher update

The terms are scaled so that averaging gradients over ranks gives the gradient of the global mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sepico import augment, losses
from sepico.config import MethodConfig
from sepico.contrast import PixelContrast, Projections
from sepico.schedule import contrast_start_step
from sepico.teacher import Teacher, fuse_day_night, trust_mask

Student = Callable[..., tuple[Tensor | None, Tensor | None]]


@dataclass
class StepBatch:
    """What one rank's slots of a step look like on the device.

    Images are float32 on the 0..1 scale; `seeds` holds one seed a slot. The target comes whole,
    the source cropped; `target_label` is for analysis only and never reaches a loss.
    `target_reference`, the day image of the place that a night image shows, comes with
    `teacher.day_night`.
    """

    seeds: list[int]
    source_image: Tensor  # (B, 3, h, w)
    source_label: Tensor  # (B, 1, h, w) int64
    target_image: Tensor | None = None  # (B, 3, H, W)
    target_label: Tensor | None = None  # (B, 1, H, W) int64
    target_reference: Tensor | None = None  # (B, 3, H, W)


@dataclass
class _Labelled:
    """A target crop with its pseudo-label and the pixels of it that carry a vote."""

    image: Tensor  # (B, 3, h, w)
    label: Tensor  # (B, h, w) int64
    trusted_label: Tensor  # (B, 1, h, w) int64, ignored where untrusted
    confident: Tensor  # () number of pixels above the threshold
    truth: Tensor | None  # (B, h, w) int64, for analysis
    reference: Tensor | None  # (B, 3, h, w), the same box of the day image


class AdaptationStep:
    """Computes the loss terms; holds the teacher and what the contrast compares with.

    Under `teacher.day_night`, `class_weight` (C,) multiplies the pseudo-labels' scores and, as the
    authors have it, the cross entropies of source and mix.
    """

    def __init__(
        self,
        config: MethodConfig,
        normalize: Callable[[Tensor], Tensor],
        teacher: Teacher | None,
        contrast: PixelContrast | None,
        class_weight: Tensor | None = None,
    ) -> None:
        self.config = config
        self.normalize = normalize
        self.teacher = teacher
        self.contrast = contrast
        weighted = config.teacher.day_night and config.method != "source_only"
        self.class_weight = class_weight if weighted else None
        self.contrast_start = contrast_start_step(config.contrast.start, config.optimization)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.share = 1.0
        # Scalars and pictures of the latest step, for telemetry.
        self.metrics: dict[str, Tensor] = {}
        self.pictures: dict[str, Tensor] = {}

    def terms(self, student: Student, batch: StepBatch, step: int) -> Iterator[Tensor]:
        """Yield the step's loss terms; each graph may be freed before the next is asked for."""
        self.metrics, self.pictures = {}, {}
        # Gradients are averaged over ranks, which may have more or fewer of the batch's images.
        images = self.config.optimization.global_batch
        self.share = self.world_size * len(batch.seeds) / images
        if self.config.method == "source_only":
            yield from self._source_only(student, batch)
        else:
            yield from self._adapt(student, batch, step)

    def _source_only(self, student: Student, batch: StepBatch) -> Iterator[Tensor]:
        image = self._strong(batch.source_image, batch.seeds)
        logits, _ = student(self.normalize(image))
        loss = self._cross_entropy(logits, batch.source_label)
        self.metrics["source_ce"] = loss.detach()
        yield loss

    def _adapt(self, student: Student, batch: StepBatch, step: int) -> Iterator[Tensor]:
        with_contrast = step >= self.contrast_start

        target = self._pseudo_label(batch)
        finish = self._start_statistics(batch, target)

        image = self._strong(batch.source_image, batch.seeds)
        logits, projections = student(self.normalize(image), projections=with_contrast)
        loss = self._cross_entropy(logits, batch.source_label)
        self.metrics["source_ce"] = loss.detach()
        source_counts, target_counts, confident_share = finish()
        if with_contrast:
            loss = loss + self._contrast("source", projections, batch.source_label, source_counts)
        yield loss

        if with_contrast:
            strong = self._strong(target.image, batch.seeds)
            _, projections = student(self.normalize(strong), logits=False)
            yield self._contrast("target", projections, target.trusted_label, target_counts)

        mixed_image, mixed_label, weight = self._mix(batch, target, confident_share)
        logits, _ = student(self.normalize(mixed_image), projections=False)
        loss = self._cross_entropy(logits, mixed_label, weight)
        self.metrics["mix_ce"] = loss.detach()
        self.metrics["confident_share"] = confident_share
        if target.truth is not None:
            labelled = target.truth != 255
            right = (target.label == target.truth) & labelled
            self.metrics["pseudo_label_right"] = self.share * right.float().mean()
            self.metrics["pseudo_label_known"] = self.share * labelled.float().mean()
        self.pictures = {
            "source": batch.source_image,
            "source_label": batch.source_label[:, 0],
            "target": target.image,
            "pseudo_label": target.label,
            "weight": weight,
            "mix": mixed_image,
            "mixed_label": mixed_label[:, 0],
        }
        if target.reference is not None:
            self.pictures["reference"] = target.reference
        yield loss

        if self.config.mic.weight:
            yield self._masked_consistency(student, batch, target, confident_share)

    def _strong(self, images: Tensor, seeds: list[int]) -> Tensor:
        return torch.stack(
            [
                augment.strong_augment(image, seed, self.config.augmentation)
                for image, seed in zip(images, seeds, strict=True)
            ]
        )

    def _label(self, image: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels (B, H, W) int64 of target images (B, 3, H, W), and their scores (B, H, W).

        With `teacher.day_night` the day image of the same place has its say.
        """
        config = self.config.teacher
        if config.day_night:
            day = self.teacher.probabilities(self.normalize(reference))
            night = self.teacher.probabilities(self.normalize(image))
            scores = fuse_day_night(
                day, night, class_weight=self.class_weight, day_ratio=config.day_ratio
            )
        else:
            scores = self.teacher.probabilities(self.normalize(image))
        score, label = scores.max(1)
        return label, score

    def _pseudo_label(self, batch: StepBatch) -> _Labelled:
        """Label the whole image, crop where classes balance, label the crop again."""
        config = self.config.teacher
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
        return _Labelled(
            image,
            label,
            torch.where(trusted, label, 255)[:, None],
            (score >= config.threshold).sum(),
            None if truth is None else truth[:, 0],
            reference,
        )

    def _start_statistics(
        self, batch: StepBatch, target: _Labelled
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """Launch the step's one fused all-reduce; the returned call awaits and merges it.

        It answers with the global numbers of kept source pixels and kept target pixels of each
        projection, and the global share of confident target pixels.
        """
        embeddings = self.teacher.embeddings(self.normalize(batch.source_image))
        kept = self.contrast.kept(embeddings, target.trusted_label)
        extra = torch.cat([kept, target.confident[None]]).double()
        sums = torch.cat([self.contrast.batch_sums(embeddings, batch.source_label), extra])
        work = None
        if dist.is_initialized():
            work = dist.all_reduce(sums, group=self.contrast.group, async_op=True)

        def finish() -> tuple[Tensor, Tensor, Tensor]:
            if work is not None:
                work.wait()
            source_counts = self.contrast.merge(sums[: -len(extra)])
            pixels = self.config.optimization.global_batch * target.label[0].numel()
            confident = sums[-1] / pixels
            return source_counts.float(), sums[-len(extra) : -1].float(), confident.float()

        return finish

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """This rank's share of the global mean."""
        class_weight = self.class_weight
        loss = losses.cross_entropy(logits, labels, weight, class_weight=class_weight)
        return self.share * loss

    def _contrast(
        self, domain: str, projections: Projections, labels: Tensor, counts: Tensor
    ) -> Tensor:
        loss, parts = self.contrast.loss(projections, labels, counts)
        self.metrics |= {f"{domain}_{name}": value for name, value in parts.items()}
        return loss

    def _mix(
        self, batch: StepBatch, target: _Labelled, confident_share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ClassMix of weak source and target crop, strongly augmented afterwards."""
        chosen = [
            augment.draw_mix_classes(label, seed)
            for label, seed in zip(batch.source_label, batch.seeds, strict=True)
        ]
        mask = augment.class_mix_mask(batch.source_label, chosen)
        image = torch.where(mask.bool(), batch.source_image, target.image)
        label = torch.where(mask.bool(), batch.source_label, target.label[:, None])
        config = self.config.teacher
        trusted = trust_mask(*image.shape[-2:], config.ignore_top, config.ignore_bottom)
        target_weight = confident_share * trusted.to(image.device)
        weight = torch.where(mask[:, 0].bool(), 1.0, target_weight)
        return self._strong(image, batch.seeds), label, weight

    def _masked_consistency(
        self, student: Student, batch: StepBatch, target: _Labelled, confident_share: Tensor
    ) -> Tensor:
        """Cross entropy of the masked target crop against the pseudo-label of the whole one."""
        config, size = self.config.mic, tuple(target.image.shape[-2:])
        masks = torch.stack([augment.block_mask(size, seed, config) for seed in batch.seeds])
        image = self.normalize(self._strong(target.image, batch.seeds))
        # Zero after normalisation is the mean colour.
        image = image.masked_fill(masks[:, None].to(image.device), 0)
        logits, _ = student(image, projections=False)
        loss = confident_share * self.share * losses.cross_entropy(logits, target.trusted_label)
        self.metrics["mic_ce"] = loss.detach()
        return config.weight * loss
