"""EMA teacher: a float32 average of the student that labels the target domain."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sepico.network import Segmentor
from sepico.statistics import check_shape
from sepico.taxonomies import CITYSCAPES_19


class Teacher:
    """Holds the averaged network and answers with pseudo-labels and features.

    As the authors run it: batch-norm uses the statistics of the batch (its running buffers are
    its own, kept for evaluation), dropout and drop-path are off.
    """

    def __init__(self, network: Segmentor) -> None:
        self.network = network.requires_grad_(False)
        # What `update` averages: a teacher that is sharded over workers puts its shards here.
        self.weights = [parameter.detach() for parameter in network.parameters()]

    def _prepare(self) -> None:
        self.network.train()
        for module in self.network.modules():
            if (
                isinstance(module, nn.modules.dropout._DropoutNd)
                or "DropPath" in type(module).__name__
            ):
                module.eval()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> probabilities of the classes (B, C, H, W)."""
        self._prepare()
        logits, _ = self.network(images, projections=False)
        logits = nn.functional.interpolate(
            logits, images.shape[-2:], mode="bilinear", align_corners=False
        )
        return logits.softmax(1)

    @torch.no_grad()
    def embeddings(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> projections (B, A, h, w)."""
        self._prepare()
        return self.network(images, logits=False)[1]

    @torch.no_grad()
    def update(self, student_weights: Iterable[Tensor], alpha: float) -> None:
        """teacher <- alpha teacher + (1 - alpha) student, float32, parameters only."""
        pairs = zip(student_weights, self.weights, strict=True)
        values = [value.view_as(average) for value, average in pairs]
        # A GPU starts a few kernels in place of a thousand.
        torch._foreach_lerp_(self.weights, values, 1 - alpha)


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
    distribution any more. Raises ValueError for another shape.
    """
    batch, _, *size = night_probs.shape
    classes = CITYSCAPES_19.num_classes
    check_shape("night_probs", night_probs, (batch, classes, *size))
    check_shape("day_probs", day_probs, (batch, classes, *size))
    if class_weight is not None:
        check_shape("class_weight", class_weight, (classes,))
    static = torch.zeros(day_probs.shape[1], 1, 1, dtype=torch.bool, device=day_probs.device)
    static[list(STATIC_CLASSES)] = True
    share = torch.full_like(day_probs, 1 - day_ratio).masked_fill_(day_probs > 0.4, day_ratio)
    fused = torch.lerp(night_probs, day_probs, share * static)
    return fused if class_weight is None else fused * class_weight.view(-1, 1, 1)


def class_weights(pixel_counts: Tensor, std: float) -> Tensor:
    """Weights (C,) float32 that favour rare classes, from a data set's pixels per class (C,).

    1 minus the standardised logarithm of the frequency times `std`, as in DANNet (Wu et al., CVPR
    2021). A class that does not occur gets 1, and so does each where all are equally frequent.
    """
    weights = torch.ones(len(pixel_counts), dtype=torch.float64)
    pixel_counts = pixel_counts.double()  # they may be unsigned, which compares with nothing
    occurs = pixel_counts > 0
    # Counts serve as well as frequencies: their sum cancels.
    log = pixel_counts[occurs].log()
    if len(log.unique()) > 1:  # classes of one frequency have no spread to divide by
        weights[occurs] += std * (log.mean() - log) / log.std()
    return weights.float()
