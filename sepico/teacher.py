"""EMA teacher: a float32 average of the student that labels the target domain."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sepico.network import Segmentor


class Teacher:
    """Holds the averaged network and answers with pseudo-labels and features.

    As the authors run it: batch-norm uses the statistics of the batch (its running buffers are
    its own, kept for evaluation), dropout and drop-path are off.
    """

    def __init__(self, network: Segmentor) -> None:
        self.network = network.requires_grad_(False)

    def _prepare(self) -> None:
        self.network.train()
        for module in self.network.modules():
            if (
                isinstance(module, nn.modules.dropout._DropoutNd)
                or "DropPath" in type(module).__name__
            ):
                module.eval()

    @torch.no_grad()
    def pseudo_label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> labels (B, H, W) int64, probabilities (B, H, W)."""
        self._prepare()
        logits, _ = self.network(images, projections=False)
        logits = nn.functional.interpolate(
            logits, images.shape[-2:], mode="bilinear", align_corners=False
        )
        probability, label = logits.softmax(1).max(1)
        return label, probability

    @torch.no_grad()
    def embeddings(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> projections (B, A, h, w)."""
        self._prepare()
        return self.network(images, logits=False)[1]

    @torch.no_grad()
    def update(self, student_parameters: Iterable[Tensor], alpha: float) -> None:
        """teacher <- alpha teacher + (1 - alpha) student, float32, parameters only."""
        pairs = zip(self.network.parameters(), student_parameters, strict=True)
        for average, value in pairs:
            average.lerp_(value.float(), 1 - alpha)


def trust_mask(height: int, width: int, top: int, bottom: int) -> Tensor:
    """(H, W) float32: 0 in the first `top` and last `bottom` rows, 1 elsewhere.

    Rectification and the car's bonnet make those rows of a target image unreliable.
    """
    mask = torch.ones(height, width)
    mask[:top] = 0
    mask[max(height - bottom, 0) :] = 0
    return mask


# Cityscapes' road, pavement, building, wall, fence, vegetation, terrain, sky: what stands in a
# night image where it stands in the day image of the same place.
STATIC_CLASSES = (0, 1, 2, 3, 4, 8, 9, 10)


def fuse_day_night(
    day_probs: Tensor,
    night_probs: Tensor,
    *,
    class_weight: Tensor | None = None,
    day_ratio: float = 0.8,
) -> Tensor:
    """Pseudo-label scores of a night image, helped by a day image of the same place.

    For static classes the day probability counts with `day_ratio` where it exceeds 0.4, else
    with 1 - day_ratio; other classes are the night's alone. Both inputs (B, C, h, w) with the 19
    classes of Cityscapes; class_weight (C,) multiplies the result -> (B, C, h, w), no
    distribution any more.
    """
    static = torch.zeros(day_probs.shape[1], 1, 1, dtype=torch.bool, device=day_probs.device)
    static[list(STATIC_CLASSES)] = True
    share = torch.where(day_probs > 0.4, day_ratio, 1 - day_ratio) * static
    fused = torch.lerp(night_probs, day_probs, share)
    return fused if class_weight is None else fused * class_weight.view(-1, 1, 1)
