"""Layers that the heads share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_act(
    channels_in: int, channels_out: int, kernel: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution (same padding), batch-norm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


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
