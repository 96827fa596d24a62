"""DAFormer decode head: multi-level features fused by a depthwise separable ASPP.

Hoyer, Dai, Van Gool: DAFormer (CVPR 2022), section 3.2.
"""

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


class SeparableASPP(nn.Module):
    """Parallel branches, one a dilation: 1x1 for dilation 1, else depthwise 3x3 + pointwise."""

    def __init__(self, channels_in: int, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            conv_norm_act(channels_in, channels)
            if dilation == 1
            else nn.Sequential(
                conv_norm_act(channels_in, channels_in, 3, dilation, groups=channels_in),
                conv_norm_act(channels_in, channels),
            )
            for dilation in dilations
        )
        self.bottleneck = conv_norm_act(len(dilations) * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([branch(features) for branch in self.branches], 1))


class DAFormerHead(nn.Module):
    """Each stage embedded to `channels`, resized to the finest, concatenated and fused."""

    dilations = (1, 6, 12, 18)  # as published

    def __init__(
        self,
        in_channels: list[int],
        channels: int,
        num_classes: int,
        dilations: tuple[int, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fusion = SeparableASPP(len(in_channels) * channels, channels, dilations)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i), finest first -> logits (B, C, h_0, w_0)."""
        size = features[0].shape[-2:]
        embedded = [
            F.interpolate(embedding(feature), size, mode="bilinear", align_corners=False)
            for embedding, feature in zip(self.embeddings, features, strict=True)
        ]
        return self.classifier(self.dropout(self.fusion(torch.cat(embedded, 1))))
