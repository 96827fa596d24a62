"""What a run contrasts against, and the contrast itself: ProtoCL, BankCL and DistCL.

One of everything per projection: the concatenated and the single-stage projection give one, the
per-stage projection gives one per encoder stage, each with its own statistics, label down-scaling
and loss (the authors' `resize_concat`, a layer index, and `multiple_select`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sepico import losses
from sepico.config import MethodConfig
from sepico.statistics import ClassStatistics, FeatureBank

Projections = Tensor | list[Tensor]


class PixelContrast:
    """Class statistics (and banks) of the source, and the loss of pixels against them.

    `group` is a process group of the statistics' own: their asynchronous all-reduce must never
    interleave with the collectives of sharded parameters or synchronised batch-norm. None means
    the default group, which is right only while those are absent.
    """

    def __init__(
        self,
        config: MethodConfig,
        *,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.method, self.config, self.group = config.method, config.contrast, group
        self.num_classes = config.model.num_classes
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.weights = config.contrast_stage_weights
        shape = (self.num_classes, config.model.projection_channels)
        self.statistics = [ClassStatistics(*shape, device) for _ in self.weights]
        self.banks = []
        if self.method == "bankcl":
            length = self.config.bank_length
            self.banks = [FeatureBank(*shape, length, device) for _ in self.weights]

    def batch_sums(self, embeddings: Projections, labels: Tensor) -> Tensor:
        """The teacher's source projections and labels (B, 1, H, W) -> one float64 vector."""
        return torch.cat(
            [
                statistics.batch_sums(*self._select(of_stage, labels))
                for statistics, of_stage in zip(self.statistics, _listed(embeddings), strict=True)
            ]
        )

    def merge(self, sums: Tensor) -> Tensor:
        """Fold the global sums in; returns the number of source pixels of each projection (L,)."""
        counts = []
        parts = sums.chunk(len(self.statistics))
        for i, (statistics, part) in enumerate(zip(self.statistics, parts, strict=True)):
            means, count = statistics.merge(part)
            if self.banks:
                self.banks[i].update(means, count > 0)
            counts.append(count.sum())
        return torch.stack(counts)

    def kept(self, embeddings: Projections, labels: Tensor) -> Tensor:
        """Number of pixels (L,) that labels (B, 1, H, W) keep on the grids of the projections."""
        return torch.stack(
            [
                (self._downscale(labels, labels.shape[-1] // of_stage.shape[-1]) != 255).sum()
                for of_stage in _listed(embeddings)
            ]
        )

    def loss(
        self, projections: Projections, labels: Tensor, counts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the weighted loss of one domain, and its parts for telemetry.

        `counts` (L,) are the global numbers of pixels of each projection.
        """
        total, contrast, spread = 0.0, 0.0, 0.0
        for i, of_stage in enumerate(_listed(projections)):
            rows, classes = self._select(of_stage, labels)
            # Gradients are averaged over ranks, a rank's sum over the global count is not a mean.
            term = self.world_size * self._against(i, rows, classes, counts[i])
            contrast = contrast + self.weights[i] * term.detach()
            total = total + self.config.weight * self.weights[i] * term
            if self.config.regularizer_weight:
                term = losses.regularizer(
                    rows,
                    self.statistics[i].mean,
                    temperature=self.config.temperature,
                    count=counts[i],
                    group=self.group,
                )
                spread = spread + self.weights[i] * term.detach()
                total = total + self.config.regularizer_weight * self.weights[i] * term
        parts = {"contrast": contrast}
        if self.config.regularizer_weight:
            parts["regularizer"] = spread
        return total, parts

    @torch.no_grad()
    def similarity(self, projections: Projections, labels: Tensor) -> Tensor:
        """Cosines of pixels and the mean of their class, for telemetry: sums and counts (2, C).

        Of the last projection; labels (B, 1, H, W).
        """
        rows, classes = self._select(_listed(projections)[-1], labels)
        means = self.statistics[-1].mean[classes]
        cosines = torch.nn.functional.cosine_similarity(rows.float(), means)
        sums = [
            torch.bincount(classes, weights, minlength=self.num_classes).double()
            for weights in (cosines.double(), None)
        ]
        return torch.stack(sums)

    def _against(self, i: int, rows: Tensor, classes: Tensor, count: Tensor) -> Tensor:
        options = {"temperature": self.config.temperature, "count": count}
        if self.method == "bankcl":
            return losses.bank_contrast(rows, classes, self.banks[i], **options)
        mean, variance = self.statistics[i].mean, self.statistics[i].variance
        if self.method == "protocl":
            return losses.proto_contrast(rows, classes, mean, **options)
        return losses.dist_contrast(rows, classes, mean, variance, **options)

    def _select(self, projection: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return losses.select_pixels(
            projection, labels, num_classes=self.num_classes, min_ratio=self.config.min_ratio
        )

    def _downscale(self, labels: Tensor, factor: int) -> Tensor:
        return losses.downscale_labels(
            labels, factor, num_classes=self.num_classes, min_ratio=self.config.min_ratio
        )

    def _parts(self) -> dict[str, ClassStatistics | FeatureBank]:
        parts = {f"statistics.{i}.": part for i, part in enumerate(self.statistics)}
        return parts | {f"bank.{i}.": part for i, part in enumerate(self.banks)}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by flat names, for example "statistics.0.mean" for the first projection."""
        return {
            prefix + name: value
            for prefix, part in self._parts().items()
            for name, value in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what this method keeps; a method without a bank leaves the state's aside.

        Raises ValueError where the state is of another method, width or number of classes.
        """
        expected = set(self.state_dict())
        if not set(state) >= expected:
            raise ValueError(
                f"the checkpoint holds class statistics {sorted(state)}, this run needs "
                f"{sorted(expected)}: it is of another method or projection"
            )
        for prefix, part in self._parts().items():
            part.load_state_dict(
                {
                    name.removeprefix(prefix): state[name]
                    for name in state
                    if name.startswith(prefix)
                }
            )


def _listed(projections: Projections) -> list[Tensor]:
    return projections if isinstance(projections, list) else [projections]
