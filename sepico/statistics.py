"""Class statistics of source features: count, mean and diagonal variance, over all workers.

One GEMM with the one-hot labels gives a batch's sums, one all-reduce makes them global, one merge
puts them into the running values, which equal those of all pixels seen so far.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class ClassStatistics:
    """Running count (C,), mean (C, A) and biased diagonal variance (C, A), float64 inside.

    `update` is the whole of it for one process or a blocking call. A training step uses its three
    parts, so that the all-reduce overlaps with the student's forward and can carry a few more
    numbers: `batch_sums` -> all-reduce -> `merge`.
    """

    def __init__(self, num_classes: int, feature_dim: int, device: torch.device | None = None):
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        shape = (num_classes, feature_dim)
        # Float64: a float32 count of pixels stops growing at 2^24.
        self.count = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self._variance = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def mean(self) -> Tensor:
        """(C, A) float32; zero for a class not seen yet."""
        return self._mean.float()

    @property
    def variance(self) -> Tensor:
        """(C, A) float32; zero for a class not seen yet."""
        return self._variance.float()

    @torch.no_grad()
    def batch_sums(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (N, A), labels (N,) in 0..C-1 -> count, sum, sum of squares: (C (2A + 1),)."""
        features = features.float()
        one_hot = torch.nn.functional.one_hot(labels, self.num_classes).double()
        sums = one_hot.T @ features.double()
        squares = one_hot.T @ features.double().square()
        return torch.cat([one_hot.sum(0), sums.flatten(), squares.flatten()])

    @torch.no_grad()
    def merge(self, sums: Tensor) -> None:
        """Fold the sums of a (global) batch into the running values."""
        c, a = self.num_classes, self.feature_dim
        count, total, square = sums.split([c, c * a, c * a])
        divisor = count.clamp(min=1)[:, None]
        batch_mean = total.view(c, a) / divisor
        batch_variance = (square.view(c, a) / divisor - batch_mean**2).clamp_(min=0)
        share = (count / (count + self.count).clamp(min=1))[:, None]
        shift = (self._mean - batch_mean) ** 2
        self._variance = torch.lerp(self._variance, batch_variance, share)
        self._variance += share * (1 - share) * shift
        self._mean = torch.lerp(self._mean, batch_mean, share)
        self.count = self.count + count

    def update(
        self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
    ) -> None:
        """Fold features (N, A) with labels (N,) in 0..C-1 of every rank of `group`.

        Without an initialised process group the batch of this process is all there is.
        """
        sums = self.batch_sums(features, labels)
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        self.merge(sums)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            raise ValueError(f"class statistics have shapes {found}, expected {expected}")
        device = self.count.device
        self.count = state["count"].to(device)
        self._mean = state["mean"].to(device)
        self._variance = state["variance"].to(device)
