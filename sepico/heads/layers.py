"""Layers that the heads share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_act(channels_in: int, channels_out: int, kernel: int = 1) -> nn.Sequential:
    """Convolution (same padding), batch-norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class DilatedDepthwiseConv(nn.Conv2d):
    """A dilated 3x3 depthwise convolution (same padding), undilated on each phase of the grid.

    Pixels that meet under dilation d have coordinates equal modulo d. Split into d x d small
    images of such pixels, the input needs no dilation any more: the same numbers from the fast
    kernels, which in channels_last do not dilate.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(channels, channels, 3, dilation=dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        batch, channels, height, width = x.shape
        d = self.dilation[0]
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % d, 0, -height % d))
        rows, columns = x.shape[1] // d, x.shape[2] // d
        phases = x.view(batch, rows, d, columns, d, channels).permute(0, 2, 4, 1, 3, 5)
        phases = phases.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
        y = F.conv2d(phases, self.weight, padding=1, groups=channels).permute(0, 2, 3, 1)
        y = y.reshape(batch, d, d, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(batch, rows * d, columns * d, channels)
        # Batch-norm is slow on views.
        return y[:, :height, :width].contiguous().permute(0, 3, 1, 2)


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
            part = resize(F.conv2d(feature, weight), size)
            total = part if total is None else total + part
        return total
