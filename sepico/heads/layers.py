"""Layers that the heads share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepico.heads.winograd import Conv3x3Function


def conv_norm_act(channels_in: int, channels_out: int, kernel: int = 1) -> nn.Sequential:
    """Convolution of kernel 1 or 3 (same padding), batch-norm, ReLU."""
    conv = Conv3x3(channels_in, channels_out) if kernel == 3 else Conv1x1(channels_in, channels_out)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution as what it is in channels_last: a product of matrices.

    Its gradients are products too, on CPUs in three quarters of the time of a convolution's.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        return _conv1x1(x, self.weight)


def _conv1x1(x: Tensor, weight: Tensor) -> Tensor:
    # Not `F.linear`: DeepSpeed puts its own in its place under ZeRO 3, which rounds otherwise.
    return (x.permute(0, 2, 3, 1) @ weight.flatten(1).t()).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution (same padding), by Winograd's tiles on CPUs in float32."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        low = x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or low:
            return super().forward(x)
        return Conv3x3Function.apply(x, self.weight)


class DilatedDepthwiseConv(nn.Conv2d):
    """A dilated 3x3 depthwise convolution (same padding), undilated on each phase of the grid.

    Pixels that meet under dilation d have coordinates equal modulo d. Split into d x d small
    images of such pixels, the input needs no dilation any more: the same numbers from the fast
    kernels, which in channels_last do not dilate, on CPUs or on GPUs (2 ms in place of 10 for 1024
    channels of 160 x 160 pixels on an H100).
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(channels, channels, 3, dilation=dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = lowered(x)  # autocast does not reach a backward that is written by hand
        return _DilatedDepthwise.apply(x, self.weight.to(x.dtype), self.dilation[0])


class _DilatedDepthwise(torch.autograd.Function):
    """By hand, because autograd would keep the phases of every dilation beside their input."""

    @staticmethod
    def forward(ctx, x, weight, d):
        ctx.save_for_backward(x, weight)
        ctx.d = d
        y = F.conv2d(_phases(x, d), weight, padding=1, groups=len(weight))
        return _grid(y, d, x.shape)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), d = ctx.saved_tensors, ctx.d
        of_phases, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(_phases(grad, d), _phases(x, d), weight, None),
            *([1, 1], [1, 1], [1, 1], False, [0, 0], len(weight)),  # stride, padding, dilation ...
            [True, True, False],
        )
        return _grid(of_phases, d, x.shape), grad_weight, None


def _phases(x: Tensor, d: int) -> Tensor:
    """(B, C, h, w) -> (B d d, C, ceil(h / d), ceil(w / d)): every d-th pixel, zeros at the end."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // d), -(-width // d)
    phase = torch.arange(d, device=x.device)[:, None]
    ys = (phase + d * torch.arange(rows, device=x.device)).clamp(max=height - 1)
    xs = (phase + d * torch.arange(columns, device=x.device)).clamp(max=width - 1)
    index = ys[:, None, :, None] * width + xs[:, None, :]
    pixels = x.permute(0, 2, 3, 1).reshape(batch, -1, channels).index_select(1, index.flatten())
    pixels = pixels.view(batch, d, d, rows, columns, channels)
    pixels[:, height - (rows - 1) * d :, :, -1] = 0
    pixels[:, :, width - (columns - 1) * d :, :, -1] = 0
    return pixels.view(-1, rows, columns, channels).permute(0, 3, 1, 2)


def _grid(phases: Tensor, d: int, size: torch.Size) -> Tensor:
    """Undo `_phases` of a tensor of that size (B, C, h, w)."""
    batch, channels, height, width = size
    rows, columns = phases.shape[-2:]
    y = torch.arange(height, device=phases.device)[:, None]
    x = torch.arange(width, device=phases.device)
    # Pixel (y, x) of the grid is pixel (y / d, x / d) of phase (y % d, x % d).
    index = ((y % d * d + x % d) * rows + y // d) * columns + x // d
    pixels = phases.permute(0, 2, 3, 1).reshape(batch, -1, channels)
    pixels = pixels.index_select(1, index.flatten())
    return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


def lowered(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes in, where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x  # on "meta", where networks are checked, there is none


def resize(features: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


class StagedConv1x1(nn.Module):
    """A 1x1 convolution over the concatenation of resized stages, each at its own resolution.

    Bilinear resizing and a 1x1 convolution commute, so every stage is convolved with its slice of
    the weight before it is resized: the same numbers without the wide full-resolution tensor.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        whole = nn.Conv2d(sum(in_channels), channels, 1, bias=False)
        self.weight = whole.weight

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i) -> (B, C, h_0, w_0)."""
        size = features[0].shape[-2:]
        total = None
        for feature, weight in zip(features, self.weight.split(self.in_channels, 1), strict=True):
            part = resize(_conv1x1(feature, weight), size)
            total = part if total is None else total + part
        return total
