"""Losses of the method and the selection of the pixels they contrast.

Xie et al., SePiCo: Semantic-Guided Pixel Contrast for Domain Adaptive Semantic Segmentation
(TPAMI 2023). Losses are means; where a batch is spread over workers, `count` (the global number
of pixels) and the world size turn a rank's sum into its share of the global mean, given that the
optimiser averages gradients over ranks.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce  # with gradient
from torch.nn import functional as F

from sepico.gradients import BankContrast, DistContrast, SelectRows
from sepico.statistics import FeatureBank, check_labels, check_shape


def downscale_labels(
    label_map: Tensor, factor: int, *, num_classes: int, min_ratio: float, ignore_index: int = 255
) -> Tensor:
    """Majority vote over factor x factor windows: (B, 1, H, W) -> (B, 1, H // f, W // f) int64.

    The ignore value votes as one more class; ties go to the lowest class. A window whose winner
    holds less than `min_ratio` of it is ignored. Incomplete windows at the edges are dropped.
    Raises ValueError for a label that is neither a class nor the ignore value, and another shape.
    """
    _check_label_map(label_map)
    labels = label_map.long()
    ignored = labels == ignore_index
    check_labels(labels.masked_fill(ignored, 0), num_classes)
    if factor == 1:
        return labels.clone()
    batch, _, height, width = labels.shape
    h, w = height // factor, width // factor
    windows = labels.masked_fill(ignored, num_classes)[:, 0, : h * factor, : w * factor]
    windows = windows.view(batch, h, factor, w, factor).transpose(2, 3).reshape(-1, factor**2)
    votes = torch.zeros(len(windows), num_classes + 1, device=labels.device)
    votes.scatter_add_(1, windows, torch.ones_like(windows, dtype=votes.dtype))
    share, winner = (votes / factor**2).max(1)
    unclear = (share < min_ratio) | (winner == num_classes)
    return torch.where(unclear, ignore_index, winner).view(batch, 1, h, w)


def select_pixels(
    feature_map: Tensor,
    label_map: Tensor,
    *,
    num_classes: int,
    min_ratio: float = 0.75,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Labelled feature pixels: (B, A, h, w), (B, 1, H, W) -> (N, A), (N,) int64.

    Rows come in the order batch, y, x. Raises ValueError when the labels are no whole multiple of
    the feature grid, not the same multiple in height and width, of another batch size or not one
    plane an image, and for a label that is neither a class nor the ignore value.
    """
    _check_label_map(label_map)
    if len(feature_map) != len(label_map):
        raise ValueError(f"{len(feature_map)} feature maps, but labels of {len(label_map)} images")
    grid, size = tuple(feature_map.shape[-2:]), tuple(label_map.shape[-2:])
    factor = size[1] // max(grid[1], 1)
    if size != (grid[0] * factor, grid[1] * factor):
        raise ValueError(
            f"labels of {size} are no whole multiple of the feature grid {grid}: "
            "choose a crop that the network's stride divides"
        )
    labels = downscale_labels(
        label_map,
        factor,
        num_classes=num_classes,
        min_ratio=min_ratio,
        ignore_index=ignore_index,
    ).flatten()
    kept = (labels != ignore_index).nonzero().squeeze(1)
    return SelectRows.apply(feature_map, kept), labels[kept]


def _check_label_map(label_map: Tensor) -> None:
    shape = tuple(label_map.shape)
    if len(shape) != 4 or shape[1] != 1 or 0 in shape[2:]:
        raise ValueError(f"label_map has shape {shape}, expected (B, 1, H, W) with pixels")


def proto_contrast(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    *,
    temperature: float,
    count: Tensor | int | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """ProtoCL: contrast against class prototypes, -log softmax_k(q.m_k / t)[y].

    Features (N, A), labels (N,), mean (C, A), class_weight (C,) -> scalar, the mean over N (or
    sum / `count`). Without a pixel it is a zero that still carries a graph. Raises ValueError for
    a label outside of 0..C-1, another shape and a temperature that is not above 0.
    """
    _check_classes(features, mean=mean, class_weight=class_weight)
    labels = _class_labels(features, labels, len(mean))
    _check_temperature(temperature)
    features = _at_least_float32(features)
    with torch.autocast(features.device.type, enabled=False):
        similarity = features @ mean.T.to(features.dtype) / temperature
    weight = None if class_weight is None else class_weight.to(features.dtype)
    losses = F.cross_entropy(similarity, labels, weight, reduction="none")
    return _mean(losses, count)


def bank_contrast(
    features: Tensor,
    labels: Tensor,
    bank: FeatureBank,
    *,
    temperature: float,
    count: Tensor | int | None = None,
) -> Tensor:
    """BankCL: contrast of a pixel q of class y against every row b of the bank of its class.

    mean_b -log(e^{q.b / t} / (e^{q.b / t} + sum_{k != y} e^{q.b_k / t})), b_k the mean row of bank
    k: a negative class counts once, however many rows it holds. A class without rows is no
    negative, and its pixels have loss 0.

    Features (N, A), labels (N,) -> scalar, the mean over N (or sum / `count`). Without a pixel it
    is a zero that still carries a graph. Raises ValueError for a label outside of the bank's
    classes, a feature of another width and a temperature that is not above 0.
    """
    check_shape("features", features, (len(features), bank.feature_dim))
    labels = _class_labels(features, labels, bank.num_classes)
    _check_temperature(temperature)
    features = _at_least_float32(features)
    with torch.autocast(features.device.type, enabled=False):
        losses = BankContrast.apply(features, labels, bank, temperature)
    return _mean(losses, count)


def dist_contrast(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    temperature: float,
    count: Tensor | int | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """DistCL: contrast against class distributions, infinitely many samples in closed form.

    For a pixel q of class y, with means m_k and diagonal variances S_k:
    -q.m_y / t + log sum_k exp(q.m_k / t + q^2.S_k / (2 t^2)).

    Features (N, A), labels (N,), mean and variance (C, A), class_weight (C,) -> scalar, the mean
    over N (or sum / `count`). Without a pixel it is a zero that still carries a graph. As in the
    authors' code, a class weight w_y multiplies the cross entropy of the logits
    q.m_k / t + q^2.S_k / (2 t^2), to which the positive's variance term is added unweighted.
    Raises ValueError for a label outside of 0..C-1, another shape and a temperature that is not
    above 0.
    """
    _check_classes(features, mean=mean, variance=variance, class_weight=class_weight)
    labels = _class_labels(features, labels, len(mean))
    _check_temperature(temperature)
    features = _at_least_float32(features)
    mean, variance = mean.to(features.dtype), variance.to(features.dtype)
    per_pixel = DistContrast.apply(features, labels, mean, variance, temperature, class_weight)
    return _mean(per_pixel, count)


def _check_classes(
    features: Tensor,
    *,
    mean: Tensor,
    variance: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> None:
    """Raise ValueError unless these describe the same classes, and features of the same width."""
    check_shape("mean", mean, (len(mean), features.shape[1]))
    if variance is not None:
        check_shape("variance", variance, tuple(mean.shape))
    if class_weight is not None:
        check_shape("class_weight", class_weight, (len(mean),))


def _class_labels(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Labels (N,) of any integer type as int64, one a row of the features, all of them classes."""
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features, but {len(labels)} labels: give one a feature")
    check_labels(labels, num_classes)
    return labels.long()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _mean(losses: Tensor, count: Tensor | int | None) -> Tensor:
    count = len(losses) if count is None else count
    return losses.sum() / torch.as_tensor(count).clamp(min=1)


def regularizer(
    features: Tensor,
    mean: Tensor,
    *,
    temperature: float,
    count: Tensor | int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """R = sum_k log p_k / (C log C), p the softmax of the mean feature over the prototypes.

    R is not linear in the mean feature: over the workers of a group the mean itself is
    all-reduced, with gradient. `count` is the global number of pixels, summed over `group` where it
    is not given; `count` without `group` means the default group, neither of them this process
    alone. Features (N, A), mean (C, A) -> scalar. Raises ValueError for another shape and a
    temperature that is not above 0.
    """
    _check_classes(features, mean=mean)
    _check_temperature(temperature)
    total = _at_least_float32(features).sum(0)
    if dist.is_initialized() and not (count is None and group is None):
        if count is None:
            count = torch.tensor(len(features), device=features.device)
            dist.all_reduce(count, group=group)
        if dist.get_world_size(group) > 1:
            group = group or dist.group.WORLD
            total = all_reduce(total, group=group)
    count = torch.as_tensor(len(features) if count is None else count)
    # Near the uniform distribution the gradient is a small difference of large terms, of which
    # float32 loses 4e-4 at temperature 100; these few numbers cost nothing in float64.
    query = total.double() / count.clamp(min=1)
    log_p = F.log_softmax(query @ mean.T.double() / temperature, 0)
    spread = log_p.sum() / (len(mean) * math.log(len(mean)))
    # Without a pixel the authors' loss is 0, not R at the zero feature.
    return (spread * (count > 0)).to(total.dtype)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Mean over ALL pixels, ignored ones included, as the authors take it.

    Logits (B, C, h, w) are resized bilinearly to the labels (B, 1, H, W); weight (B, H, W) and
    class_weight (C,) multiply a pixel's loss and not the denominator. In float32 or better. Raises
    ValueError for another shape, and for a label that is neither a class nor the ignore value, on
    CPUs: a GPU would have to be waited for.
    """
    check_shape("labels", labels, (len(logits), 1, *labels.shape[-2:]))
    if weight is not None:
        check_shape("weight", weight, (len(logits), *labels.shape[-2:]))
    if labels.device.type == "cpu":
        check_labels(labels.masked_fill(labels == ignore_index, 0), logits.shape[1])
    logits = _at_least_float32(logits)
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    losses = F.cross_entropy(
        logits, labels[:, 0].long(), class_weight, ignore_index=ignore_index, reduction="none"
    )
    return (losses if weight is None else losses * weight).mean()
