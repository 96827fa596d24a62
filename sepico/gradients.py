"""Gradients written by hand, where autograd would keep or move what the gradient does not need.

Each function is differentiable once, in its first argument only.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from sepico.statistics import FeatureBank, chunk_size

# Pixels of a channel-first map that are transposed at once: 512 channels of them fit in the cache,
# where one pixel alone touches a cache line of every channel.
BLOCK = 256


class SelectRows(torch.autograd.Function):
    """Pixels of a map (B, A, h, w) at `kept` (N,), ascending indices of B h w pixels: (N, A).

    Autograd would copy the whole map to rows, and build a gradient of all rows and transpose it;
    this one moves kept pixels only, and writes their gradient into the layout of the map.
    """

    @staticmethod
    def forward(ctx, feature_map: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.shape = feature_map.shape
        ctx.channels_last = feature_map.is_contiguous(memory_format=torch.channels_last)
        if ctx.channels_last:
            return feature_map.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, kept)
        rows = feature_map.new_empty(len(kept), feature_map.shape[1])
        for plane, pixels, block in _blocks(feature_map, kept, rows):
            block.copy_(plane.index_select(1, pixels).T)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (kept,) = ctx.saved_tensors
        batch, channels, h, w = ctx.shape
        if ctx.channels_last:
            rows = grad.new_zeros(batch * h * w, channels).index_copy_(0, kept, grad)
            return rows.view(batch, h, w, channels).permute(0, 3, 1, 2), None
        result = grad.new_zeros(ctx.shape)
        for plane, pixels, block in _blocks(result, kept, grad):
            plane.scatter_(1, pixels.expand(channels, -1), block.T)
        return result, None


def _blocks(
    feature_map: Tensor, kept: Tensor, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An image (A, h w), up to BLOCK kept pixels of it, and their rows (n, A)."""
    planes = feature_map.flatten(2)
    size = planes.shape[2]
    counts = (kept // size).bincount(minlength=len(planes)).tolist()
    images = zip(planes, (kept % size).split(counts), rows.split(counts), strict=True)
    for plane, pixels, of_image in images:
        for block in zip(pixels.split(BLOCK), of_image.split(BLOCK), strict=True):
            yield plane, *block


class DistContrast(torch.autograd.Function):
    """DistCL of each pixel: (N, A), (N,), (C, A), (C, A), float, (C,) or None -> (N,).

    Autograd would keep q^2 and its gradient, each as large as the features themselves; the
    gradient needs only the softmax (N, C), and q^2 is made a chunk at a time, on CPUs in the cache.
    """

    @staticmethod
    def forward(ctx, features, labels, mean, variance, temperature, class_weight):
        spread = features.new_empty(len(features), len(mean))
        logits = torch.empty_like(spread)
        similar, varied = mean.T / temperature, variance.T / (2 * temperature**2)
        size = chunk_size(features)
        scratch = torch.empty_like(features[:size])
        chunks = zip(features.split(size), spread.split(size), logits.split(size), strict=True)
        for q, of_variance, of_both in chunks:
            torch.mm(torch.square(q, out=scratch[: len(q)]), varied, out=of_variance)
            torch.addmm(of_variance, q, similar, out=of_both)
        own = labels[:, None]
        weight = torch.ones_like(labels, dtype=logits.dtype)
        if class_weight is not None:
            weight = class_weight[labels].to(logits.dtype)
        losses = weight * (logits.logsumexp(1) - logits.gather(1, own).squeeze(1))
        ctx.save_for_backward(features, labels, mean, variance, logits.softmax(1), weight)
        ctx.temperature = temperature
        return losses + spread.gather(1, own).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, labels, mean, variance, softmax, weight = ctx.saved_tensors
        own = labels[:, None]
        # d CE / d logits; the positive's variance term adds one to it for the variances.
        of_mean = softmax * (weight * grad)[:, None]
        of_mean.scatter_add_(1, own, -(weight * grad)[:, None])
        of_variance = of_mean.scatter_add(1, own, grad[:, None])
        mean, variance = mean / ctx.temperature, variance / ctx.temperature**2
        result = torch.empty_like(features)
        size = chunk_size(features)
        scratch = torch.empty_like(features[:size])
        chunks = (part.split(size) for part in (features, of_mean, of_variance, result))
        for q, for_mean, for_variance, rows in zip(*chunks, strict=True):
            torch.mm(for_mean, mean, out=rows)
            rows.addcmul_(q, torch.mm(for_variance, variance, out=scratch[: len(q)]))
        return result, None, None, None, None, None


class BankContrast(torch.autograd.Function):
    """BankCL of each pixel: (N, A), (N,), FeatureBank, float -> (N,).

    Pixels are taken class by class, so that one matrix product compares them with the rows of
    their own bank; only the margins (N, M) are kept for the gradient.
    """

    @staticmethod
    def forward(ctx, features: Tensor, labels: Tensor, bank: FeatureBank, temperature: float):
        means = bank.means().to(features.dtype)
        similarity = features @ (means / temperature).T
        # Zero where a class holds no row, unless the pixel is NaN.
        losses = similarity[:, 0] * 0
        classes = torch.arange(bank.num_classes, device=labels.device)
        # Not -inf, whose softmax is NaN where no negative is left.
        excluded = torch.finfo(similarity.dtype).min
        similarity.masked_fill_((classes == labels[:, None]) | ~bank.present, excluded)
        negative = similarity.logsumexp(1, keepdim=True)
        parts = []
        sizes = labels.bincount(minlength=bank.num_classes).tolist()
        for c, of_class in enumerate(labels.argsort().split(sizes)):
            rows = bank.rows(c).to(features.dtype)
            if not len(of_class) or not len(rows):
                continue
            for pixels in of_class.split(chunk_size(features)):
                margin = torch.addmm(
                    negative[pixels], features[pixels], rows.T, alpha=-1 / temperature
                )
                # -log(e^p / (e^p + e^n)) = softplus(n - p), which no temperature overflows.
                losses[pixels] = softplus(margin).mean(1)
                parts += [pixels, margin, rows]
        ctx.save_for_backward(means, similarity.softmax(1), *parts)
        ctx.temperature = temperature
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        means, softmax, *parts = ctx.saved_tensors
        result = grad.new_zeros(len(grad), means.shape[1])
        for pixels, margin, rows in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            factors = margin.sigmoid() * (grad[pixels] / (len(rows) * ctx.temperature))[:, None]
            of_negative = softmax[pixels] * factors.sum(1, keepdim=True)
            result[pixels] = torch.addmm(of_negative @ means, factors, rows, alpha=-1)
        return result, None, None, None
