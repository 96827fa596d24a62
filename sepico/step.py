"""One step of the method: a batch -> its loss terms, in order.

    terms = AdaptationStep(...).terms(student, batch, step)
    for term in terms: backward(term)          # one graph alive at a time
    optimiser step; teacher update

The terms are scaled so that averaging gradients over ranks gives the gradient of the global mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from sepico import augment, losses
from sepico.batch import StepBatch
from sepico.config import MethodConfig
from sepico.contrast import PixelContrast, Projections
from sepico.pseudo_labels import LabelledCrop, PseudoLabeller
from sepico.schedule import contrast_start_step
from sepico.teacher import Teacher, trust_mask

Student = Callable[..., tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class _Global:
    """What the step's all-reduce answers: over all images of the step, all ranks."""

    source_counts: Tensor  # (L,) kept pixels of each projection
    target_counts: Tensor  # (L,), 0 where no pixel is confident
    confident_share: Tensor  # () of the target's pixels


class AdaptationStep:
    """Computes the loss terms; holds the teacher and what the contrast compares with.

    With `teacher.class_weight_std`, `class_weight` (C,) multiplies the scores of pseudo-labels and,
    as the authors have it from day to night, the cross entropies of source and mix.

    Raises ValueError for a regulariser over several passes a step.
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
        weighted = config.teacher.class_weight_std and config.method != "source_only"
        self.class_weight = class_weight if weighted else None
        self.contrast_start = contrast_start_step(config.contrast.start, config.optimization)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        config.check_passes(self.world_size)
        # Scalars and pictures of the latest step, for telemetry.
        self.metrics: dict[str, Tensor] = {}
        self.class_sums: dict[str, Tensor] = {}  # sums and counts (2, C) of a mean per class
        self.pictures: dict[str, Tensor] = {}

    def terms(
        self, student: Student, batch: StepBatch, step: int, *, per_class: bool = False
    ) -> Iterator[Tensor]:
        """Yield the step's loss terms; each graph may be freed before the next is asked for.

        `per_class` measures `class_sums` too.
        """
        self.metrics, self.class_sums, self.pictures = {}, {}, {}
        self._per_class = per_class
        batches = batch.split(self.config.optimization.passes(self.world_size))
        if self.config.method == "source_only":
            for batch in batches:
                yield self._source_only(student, batch)
            return
        teacher = self.config.teacher
        pseudo_label = PseudoLabeller(teacher, self.normalize, self.teacher, self.class_weight)
        targets = [pseudo_label(batch) for batch in batches]
        await_statistics = self._start_statistics(batches, targets)
        for batch, target in zip(batches, targets, strict=True):
            yield from self._adapt(student, batch, target, await_statistics, step)

    def _source_only(self, student: Student, batch: StepBatch) -> Tensor:
        image = self._strong(batch.source_image, batch.seeds)
        logits, _ = student(self.normalize(image))
        loss = self._cross_entropy(logits, batch.source_label)
        self._measure("source_ce", loss)
        return loss

    def _adapt(
        self,
        student: Student,
        batch: StepBatch,
        target: LabelledCrop,
        await_statistics: Callable[[], _Global],
        step: int,
    ) -> Iterator[Tensor]:
        """The terms of one pass over some of the step's slots."""
        with_contrast = step >= self.contrast_start
        image = self._strong(batch.source_image, batch.seeds)
        logits, projections = student(self.normalize(image), projections=with_contrast)
        loss = self._cross_entropy(logits, batch.source_label)
        self._measure("source_ce", loss)
        known = await_statistics()
        if with_contrast:
            counts = known.source_counts
            loss = loss + self._contrast("source", projections, batch.source_label, counts)
        yield loss

        if with_contrast:
            strong = self._strong(target.image, batch.seeds)
            _, projections = student(self.normalize(strong), logits=False)
            # As the authors have it, a pseudo-label of weight 0 contrasts nothing.
            labels = target.trusted_label.masked_fill(known.confident_share == 0, 255)
            yield self._contrast("target", projections, labels, known.target_counts)

        mixed_image, mixed_label, weight = self._mix(batch, target, known.confident_share)
        logits, _ = student(self.normalize(mixed_image), projections=False)
        loss = self._cross_entropy(logits, mixed_label, weight)
        self._measure("mix_ce", loss)
        self.metrics["confident_share"] = known.confident_share
        share = self._share(len(batch.seeds))
        self._measure("teacher_confidence", share * target.score)
        if self._per_class:
            voted = target.label.flatten().bincount(minlength=self.config.model.num_classes)
            everything = torch.full_like(voted, target.label.numel())
            self._add_per_class("pseudo_label_share", torch.stack([voted, everything]).double())
        if target.truth is not None:
            labelled = target.truth != 255
            right = (target.label == target.truth) & labelled
            self._measure("pseudo_label_right", share * right.float().mean())
            self._measure("pseudo_label_known", share * labelled.float().mean())
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
            yield self._masked_consistency(student, batch, target, known.confident_share)

    def _share(self, images: int) -> float:
        """Weight of a mean over some of this rank's images: gradients are averaged over ranks."""
        return self.world_size * images / self.config.optimization.global_batch

    def _measure(self, name: str, part: Tensor) -> None:
        """Add a pass's part of a metric."""
        self.metrics[name] = self.metrics.get(name, 0) + part.detach()

    def _add_per_class(self, name: str, sums: Tensor) -> None:
        """Add a pass's sums and counts (2, C)."""
        self.class_sums[name] = self.class_sums.get(name, 0) + sums

    def _strong(self, images: Tensor, seeds: list[int]) -> Tensor:
        return torch.stack(
            [
                augment.strong_augment(image, seed, self.config.augmentation)
                for image, seed in zip(images, seeds, strict=True)
            ]
        )

    def _start_statistics(
        self, batches: list[StepBatch], targets: list[LabelledCrop]
    ) -> Callable[[], _Global]:
        """Launch the step's one fused all-reduce; the returned call awaits and merges it, once."""
        parts = []
        for batch, target in zip(batches, targets, strict=True):
            embeddings = self.teacher.embeddings(self.normalize(batch.source_image))
            kept = self.contrast.kept(embeddings, target.trusted_label)
            extra = torch.cat([kept, target.confident[None]]).double()
            of_source = self.contrast.batch_sums(embeddings, batch.source_label)
            parts.append(torch.cat([of_source, extra]))
        sums = torch.stack(parts).sum(0)
        work = None
        if dist.is_initialized():
            work = dist.all_reduce(sums, group=self.contrast.group, async_op=True)

        @cache
        def finish() -> _Global:
            if work is not None:
                work.wait()
            source_counts = self.contrast.merge(sums[: -len(extra)])
            pixels = self.config.optimization.global_batch * targets[0].label[0].numel()
            confident = sums[-1] / pixels
            target_counts = sums[-len(extra) : -1] * (confident > 0)
            return _Global(source_counts.float(), target_counts.float(), confident.float())

        return finish

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """A pass's share of the global mean."""
        class_weight = self.class_weight
        loss = losses.cross_entropy(logits, labels, weight, class_weight=class_weight)
        return self._share(len(labels)) * loss

    def _contrast(
        self, domain: str, projections: Projections, labels: Tensor, counts: Tensor
    ) -> Tensor:
        loss, parts = self.contrast.loss(projections, labels, counts)
        if self._per_class:
            similarity = self.contrast.similarity(projections, labels)
            self._add_per_class(f"{domain}_similarity", similarity)
        for name, value in parts.items():
            self._measure(f"{domain}_{name}", value)
        return loss

    def _mix(
        self, batch: StepBatch, target: LabelledCrop, confident_share: Tensor
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
        self, student: Student, batch: StepBatch, target: LabelledCrop, confident_share: Tensor
    ) -> Tensor:
        """Cross entropy of the masked target crop against the pseudo-label of the whole one."""
        config, size = self.config.mic, tuple(target.image.shape[-2:])
        masks = torch.stack([augment.block_mask(size, seed, config) for seed in batch.seeds])
        image = self.normalize(self._strong(target.image, batch.seeds))
        # Zero after normalisation is the mean colour.
        image = image.masked_fill(masks[:, None].to(image.device), 0)
        logits, _ = student(image, projections=False)
        share = confident_share * self._share(len(image))
        loss = share * losses.cross_entropy(logits, target.trusted_label)
        self._measure("mic_ce", loss)
        return config.weight * loss
