"""Gradients written by hand, where autograd would keep or move what the gradient does not need.

Each function is differentiable once, in its first argument.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sepico.statistics import CHUNK, FeatureBank


class SelectRows(torch.autograd.Function):
    """Pixels of a map (B, A, h, w) at indices (b, y, x), each (N,) and no pixel twice: (N, A).

    Autograd would build a gradient of rows and transpose it into the map's layout; this one is
    written into the map's layout at once, and plainly, because no two rows meet in a pixel.
    """

    @staticmethod
    def forward(ctx, feature_map: Tensor, *pixels: Tensor) -> Tensor:
        ctx.save_for_backward(*pixels)
        # Shape, dtype and layout without the values.
        ctx.layout = torch.empty_like(feature_map, device="meta")
        return feature_map.permute(0, 2, 3, 1)[pixels]

    @staticmethod
    def backward(ctx, grad: Tensor):
        pixels = ctx.saved_tensors
        result = torch.zeros_like(ctx.layout, device=grad.device)
        result.permute(0, 2, 3, 1)[pixels] = grad
        return result, *[None] * len(pixels)


class DistContrast(torch.autograd.Function):
    """DistCL of each pixel: (N, A), (N,), (C, A), (C, A), float, (C,) or None -> (N,).

    Autograd would keep q^2 and its gradient, each as large as the features themselves; the
    gradient needs only the softmax (N, C).
    """

    @staticmethod
    def forward(ctx, features, labels, mean, variance, temperature, class_weight):
        # Rows of q^2 are made a chunk at a time and stay in the cache.
        spread = torch.cat([rows.square() @ variance.T for rows in features.split(CHUNK)])
        spread /= 2 * temperature**2
        logits = (features @ mean.T).div_(temperature).add_(spread)
        own = labels[:, None]
        weight = torch.ones_like(labels, dtype=logits.dtype)
        if class_weight is not None:
            weight = class_weight[labels]
        losses = weight * (logits.logsumexp(1) - logits.gather(1, own).squeeze(1))
        ctx.save_for_backward(features, labels, mean, variance, logits.softmax(1), weight)
        ctx.temperature = temperature
        return losses + spread.gather(1, own).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        features, labels, mean, variance, softmax, weight = ctx.saved_tensors
        own = labels[:, None]
        # d CE / d logits; the positive's variance term adds one to it for the variances.
        of_mean = softmax * (weight * grad)[:, None]
        of_mean.scatter_add_(1, own, -(weight * grad)[:, None])
        of_variance = of_mean.scatter_add(1, own, grad[:, None])
        result = of_mean @ (mean / ctx.temperature)
        chunks = zip(
            result.split(CHUNK), features.split(CHUNK), of_variance.split(CHUNK), strict=True
        )
        variance = variance / ctx.temperature**2
        for rows, q, factors in chunks:
            rows.addcmul_(q, factors @ variance)
        return result, None, None, None, None, None


class BankContrast(torch.autograd.Function):
    """BankCL of each pixel: (N, A), (N,), FeatureBank, float -> (N,).

    Pixels are taken class by class, so that one matrix product compares them with the rows of
    their own bank; only the margins (N, M) are kept for the gradient.
    """

    @staticmethod
    def forward(ctx, features: Tensor, labels: Tensor, bank: FeatureBank, temperature: float):
        means = bank.means()
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
            rows = bank.rows(c)
            for pixels in of_class.split(CHUNK) if len(of_class) and len(rows) else ():
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
    def backward(ctx, grad: Tensor):
        means, softmax, *parts = ctx.saved_tensors
        result = grad.new_zeros(len(grad), means.shape[1])
        for pixels, margin, rows in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            factors = margin.sigmoid() * (grad[pixels] / (len(rows) * ctx.temperature))[:, None]
            of_negative = softmax[pixels] * factors.sum(1, keepdim=True)
            result[pixels] = torch.addmm(of_negative @ means, factors, rows, alpha=-1)
        return result, None, None, None
