"""Batch-norm over the images of all workers, on any backend.

`torch.nn.SyncBatchNorm` refuses CPU tensors; this one runs wherever `torch.distributed` does, and
keeps layers that fuse an activation into their batch-norm (timm's `BatchNormAct2d`) as they are.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sepico.config import BatchNormMode
from sepico.rank_sum import RankSum

BLOCK_PIXELS = 8192  # over which a float32 sum is exact to 1e-4 of a small standard deviation


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalise with the statistics of all ranks; gradients as if the batch were in one place."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, sum_over_ranks):
        count = x.numel() // x.shape[1]
        mean, variance = _moments(x)
        # Float64 moments merge without the cancellation of E[x^2] - m^2 in float32.
        mean, variance = mean.double(), variance.double()
        sums = torch.cat([mean * count, (variance + mean**2) * count, mean.new_full((1,), count)])
        sums = sum_over_ranks(sums)
        total = sums[-1]
        mean, square = sums[:-1].div_(total).chunk(2)
        variance = (square - mean**2).clamp_(min=0)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.sum_over_ranks, ctx.total = eps, sum_over_ranks, total
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, total

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, variance = ctx.saved_tensors
        inverse_std = torch.rsqrt(variance + ctx.eps)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, inverse_std, False, ctx.eps, [False, True, True]
        )
        means = ctx.sum_over_ranks(torch.cat([grad_bias, grad_weight]).double())
        mean_grad, mean_grad_xhat = (means / ctx.total).to(weight.dtype).chunk(2)
        # dx = w/std (dy - mean(dy) - xhat mean(dy xhat)) is an affine map of dy and one of x, which
        # is what batch-norm with given statistics does in one pass, of low precision too.
        factor = weight * inverse_std
        slope = -factor * inverse_std * mean_grad_xhat
        if not x.is_cuda:
            slope = slope.to(x.dtype).to(slope.dtype)
        offset = -factor * mean_grad - slope * mean
        if x.is_cuda:
            dx = _affine(grad, factor, torch.zeros_like(offset)).add_(_affine(x, slope, offset))
        else:
            dx = _affine(grad, factor, offset).addcmul_(x, slope.to(x.dtype).view(1, -1, 1, 1))
        return dx, grad_weight, grad_bias, None, None


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """slope x + offset, of x (B, C, H, W) and float32 numbers of its channels (C,)."""
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    # Some versions of PyTorch refuse an eps of 0; this one added to 1 is 1.
    return F.batch_norm(x, zero, one, slope, offset, False, 0.0, 1e-30)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (B, C, H, W), in float32 or better."""
    if x.is_cuda:
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, variance
    if x.dtype in (torch.bfloat16, torch.float16):
        return _moments_of_blocks(x)
    # On the CPU var_mean is a loop over scalars, 3 to 10 times as long as two vectorised passes.
    count = x.numel() // x.shape[1]
    mean = x.sum((0, 2, 3)) / count
    return mean, (x - mean.view(1, -1, 1, 1)).square_().sum((0, 2, 3)) / count


def _moments_of_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, by PyTorch's own passes over x in low precision, without a copy of it.

    They add one pixel after another in float32, which over a large image loses more than x is
    rounded by: they get a block of pixels at a time.
    """
    rows = max(1, BLOCK_PIXELS // x.shape[3])
    blocks = [block for image in x.split(1) for block in image.split(rows, 2)]
    # Running statistics of float32, unused here, make the answer float32.
    unused = torch.zeros(2, x.shape[1])
    parts = [torch.batch_norm_update_stats(block, *unused, 0.0) for block in blocks]
    means, variances = (torch.stack(part).double() for part in zip(*parts, strict=True))
    share = means.new_tensor([block.numel() / x.numel() for block in blocks])[:, None]
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square_())).sum(0)


class _BatchStatistics:
    """Mixed into a batch-norm class by `set_batch_norm`; the module keeps its parameters.

    In training `normalize(x, momentum)` normalises and updates the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        y = self.normalize(x, momentum)
        # timm's BatchNormAct2d applies its activation itself.
        return self.act(self.drop(y)) if hasattr(self, "act") else y


class _Synchronized(_BatchStatistics):
    """With the statistics of all ranks."""

    sum_over_ranks: RankSum  # one for all layers of a network

    def normalize(self, x: Tensor, momentum: float) -> Tensor:
        y, mean, variance, total = _GlobalBatchNorm.apply(
            x, self.weight, self.bias, self.eps, self.sum_over_ranks
        )
        unbiased = variance * (total / (total - 1).clamp(min=1)).to(variance.dtype)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)
        return y


class _Local(_BatchStatistics):
    """PyTorch's own, whose kernels of cuDNN read scale and shift four at a time: in the flat
    buffers of ZeRO they lie anywhere, and CUDA fails (PyTorch's issue 195186)."""

    def normalize(self, x: Tensor, momentum: float) -> Tensor:
        running = self.running_mean, self.running_var
        affine = _aligned(self.weight), _aligned(self.bias)
        return F.batch_norm(x, *running, *affine, True, momentum, self.eps)


def _aligned(parameter: Tensor) -> Tensor:
    """The parameter, or on a GPU a copy of it if it does not begin at a multiple of 16 bytes."""
    misplaced = parameter.is_cuda and parameter.data_ptr() % 16
    return parameter.clone() if misplaced else parameter


class _Frozen:
    """Normalises with the running statistics, in training too."""

    def forward(self, x: Tensor) -> Tensor:
        training, self.training = self.training, False
        try:
            return super().forward(x)
        finally:
            self.training = training


def set_batch_norm(network: nn.Module, mode: BatchNormMode) -> None:
    """Make every batch-norm layer of `network` synchronised, frozen or local, in place.

    The process group must exist before "sync" is asked for; with one process "sync" is "local",
    PyTorch's own. On the CPU that is the less exact one: it sums the mean of a channels-last image
    in float32, which shows (gradients 1e-3 off) where a channel hardly varies.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    mixin = _Frozen if mode == "frozen" else _Local if mode == "local" or alone else _Synchronized
    sum_over_ranks = RankSum()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, mixin):
            cls = type(module)
            module.__class__ = type(mixin.__name__.strip("_") + cls.__name__, (mixin, cls), {})
            if mixin is _Synchronized:
                module.sum_over_ranks = sum_over_ranks
