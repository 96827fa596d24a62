"""Confusion matrix and intersection over union; what predictions say of themselves, unlabelled."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sepico.statistics import check_labels


class ConfusionMatrix:
    """Counts (C, C) int64, rows true and columns predicted classes, ignored pixels left out."""

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add two integer label maps of one shape.

        Raises ValueError for a label or a prediction on a labelled pixel that is no class.
        """
        labelled = target != self.ignore_index
        target, prediction = target[labelled].long(), prediction[labelled].long()
        for classes in (target, prediction):
            check_labels(classes, self.num_classes)
        cells = target * self.num_classes + prediction
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2)
        self.counts += counts.view(self.num_classes, self.num_classes).cpu()

    def all_reduce(self, device: torch.device) -> None:
        """Sum over all workers; `device` is where the process group's backend communicates."""
        counts = self.counts.to(device)
        dist.all_reduce(counts)
        self.counts = counts.cpu()

    def iou(self) -> Tensor:
        """(C,) float64 fractions, NaN where a class is neither there nor predicted."""
        intersection = self.counts.diag().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diag()
        return torch.where(union > 0, intersection / union, torch.nan)

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """Mean IoU over `classes` (default: all), those neither there nor predicted left out.

        Pixels of the other classes still count where they are confused with these, as in the
        published results on 16 and 13 of 19 classes.
        """
        iou = self.iou()
        return (iou if classes is None else iou[list(classes)]).nanmean().item()


class Certainty:
    """How sure a network is of its predictions, over all pixels: proxies where labels are missing.

    `information` is the mutual information of pixel and class (Bridle et al., 1991): it grows as
    predictions get sure, and falls as they all become the same class, which the others reward.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        # Sums over pixels: 1, largest probability, entropy, probability of each class.
        self._sums = torch.zeros(3 + num_classes, dtype=torch.float64)

    def update(self, probabilities: Tensor) -> None:
        """Add the pixels of probabilities (B, C, h, w)."""
        pixels = torch.tensor(float(probabilities[:, 0].numel()), device=probabilities.device)
        largest = probabilities.amax(1).sum()
        entropy = -torch.special.xlogy(probabilities, probabilities).sum()
        of_classes = probabilities.sum((0, 2, 3))
        self._sums += torch.cat([torch.stack([pixels, largest, entropy]), of_classes]).cpu()

    def all_reduce(self, device: torch.device) -> None:
        """Sum over all workers; `device` is where the process group's backend communicates."""
        sums = self._sums.to(device)
        dist.all_reduce(sums)
        self._sums = sums.cpu()

    def measures(self) -> dict[str, float]:
        """Fractions: mean largest probability, entropy and information, these of log C."""
        means = self._sums[1:] / self._sums[0]
        confidence, entropy = means[0].item(), means[1].item()
        marginal = -torch.special.xlogy(means[2:], means[2:]).sum().item()
        most = math.log(self.num_classes)
        return {
            "confidence": confidence,
            "entropy": entropy / most,
            "information": (marginal - entropy) / most,
        }
