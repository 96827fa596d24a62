"""Class statistics of source features: count, mean and diagonal variance, over all workers.

A batch's sums are taken class by class, one all-reduce makes them global, one merge puts them into
the running values, which equal those of all pixels seen so far.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# Rows whose copies stay in a CPU's cache.
CHUNK = 1024


def chunk_size(rows: Tensor) -> int:
    """Rows that are taken at once: a GPU, where each chunk is some launches, takes all."""
    return CHUNK if rows.device.type == "cpu" else max(len(rows), 1)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a label outside of 0..num_classes - 1, whatever the shape of labels."""
    if not labels.numel():
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels lie in {low}..{high} where {num_classes} classes are known: taxonomy, network "
            "and statistics need the same classes, and ignored pixels are left out"
        )


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError for a tensor that would broadcast, or fail later, for its shape."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")


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
        """Features (N, A), labels (N,) in 0..C-1 -> count, sum, sum of squares: (C (2A + 1),).

        Float64, since E[x^2] - m^2 is a small difference of large numbers. Each class is summed by
        itself, so that a NaN stays in its class; one GEMM with the one-hot labels would spread it.
        Raises ValueError for another label or width.
        """
        check_shape("features", features, (len(labels), self.feature_dim))
        check_labels(labels, self.num_classes)
        sums = torch.zeros(self.num_classes, 2 * self.feature_dim + 1, dtype=torch.float64)
        sums = sums.to(features.device)
        sizes = labels.bincount(minlength=self.num_classes)
        sums[:, 0] = sizes
        for row, of_class in zip(sums, labels.argsort().split(sizes.tolist()), strict=True):
            _, total, square = row.split([1, self.feature_dim, self.feature_dim])
            for pixels in of_class.split(chunk_size(features)):
                rows = features.index_select(0, pixels).double()
                total += rows.sum(0)
                square += rows.square_().sum(0)
        return sums.flatten()

    @torch.no_grad()
    def merge(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Fold the sums of a (global) batch in; returns its class means (C, A) and counts (C,)."""
        count, total, square = sums.view(self.num_classes, -1).split(
            [1, self.feature_dim, self.feature_dim], dim=1
        )
        batch_mean = total / count.clamp(min=1)
        batch_variance = (square / count.clamp(min=1) - batch_mean**2).clamp_(min=0)
        count = count.squeeze(1)
        share = (count / (count + self.count).clamp(min=1))[:, None]
        shift = (self._mean - batch_mean) ** 2
        self._variance = torch.lerp(self._variance, batch_variance, share)
        self._variance += share * (1 - share) * shift
        self._mean = torch.lerp(self._mean, batch_mean, share)
        self.count = self.count + count
        return batch_mean.float(), count

    def update(
        self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fold features (N, A) with labels (N,) in 0..C-1 of every rank of `group`; see `merge`.

        Without an initialised process group the batch of this process is all there is.
        """
        sums = self.batch_sums(features, labels)
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        return self.merge(sums)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            raise ValueError(f"class statistics have shapes {found}, expected {expected}")
        device = self.count.device
        self.count = state["count"].to(device, torch.float64)
        self._mean = state["mean"].to(device, torch.float64)
        self._variance = state["variance"].to(device, torch.float64)


class FeatureBank:
    """The latest class means of source batches, per class a queue of at most `length` rows.

    The authors' queues start with a row of zeros, which is a prototype of nothing; these start
    empty. Raises ValueError for a length below 1.
    """

    def __init__(
        self, num_classes: int, feature_dim: int, length: int, device: torch.device | None = None
    ) -> None:
        if length < 1:
            raise ValueError(f"the feature bank's length is {length}: at least 1 row a class")
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.length = length
        self._rows = torch.zeros(num_classes, length, feature_dim, device=device)
        self._pushed = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @property
    def present(self) -> Tensor:
        """(C,) bool: classes that have a row."""
        return self._pushed > 0

    @torch.no_grad()
    def update(self, class_means: Tensor, present: Tensor) -> None:
        """Append a row of class_means (C, A) for every class in present (C,) bool.

        Raises ValueError for another shape of either.
        """
        check_shape("class_means", class_means, (self.num_classes, self.feature_dim))
        check_shape("present", present, (self.num_classes,))
        classes = present.nonzero().squeeze(1)
        self._rows[classes, self._pushed[classes] % self.length] = class_means[classes].float()
        self._pushed[classes] += 1

    def rows(self, c: int) -> Tensor:
        """(M, A) float32 rows of class c, oldest first; M = 0 before its first update."""
        pushed = int(self._pushed[c])
        if pushed <= self.length:
            return self._rows[c, :pushed].clone()
        return self._rows[c].roll(-(pushed % self.length), 0)

    def means(self) -> Tensor:
        """(C, A) float32 mean row of each class; zero for a class without rows."""
        # Slots that were never written are zero.
        held = self._pushed.clamp(max=self.length)
        return self._rows.sum(1) / held.clamp(min=1)[:, None]

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self._rows, "pushed": self._pushed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Of a longer bank the newest rows, as if it had been of this length from its beginning."""
        rows, pushed = state["rows"], state["pushed"]
        stored, found = rows.shape[1], (len(rows), rows.shape[2])
        expected = (self.num_classes, self.feature_dim)
        if found != expected or stored < self.length:
            raise ValueError(
                f"the feature bank has shape {tuple(rows.shape)}, expected "
                f"{tuple(self._rows.shape)} or longer"
            )
        self._pushed = pushed.to(self._pushed.device, copy=True)
        # The row of push number j lies at j modulo the length; these are the newest ones'.
        slots = torch.arange(self.length, device=rows.device)
        newest = pushed[:, None] - 1 - (pushed[:, None] - 1 - slots) % self.length
        taken = rows.gather(1, (newest % stored)[..., None].expand(-1, -1, rows.shape[2]))
        self._rows = taken.where((newest >= 0)[..., None], 0).to(self._rows.device)
