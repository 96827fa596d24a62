"""DAFormer decode head: multi-level features fused by a depthwise separable ASPP.

Hoyer, Dai, Van Gool: DAFormer (CVPR 2022), section 3.2.
"""

import torch
from torch import Tensor, nn

from sepico.heads.layers import (
    Conv1x1,
    DilatedDepthwiseConv,
    StagedConv1x1,
    conv_norm_act,
    lowered,
    resize,
)


class SeparableASPP(nn.Module):
    """Parallel branches over the concatenation of resized stages, fused by a 3x3 convolution.

    One branch a dilation: 1x1 for dilation 1, else depthwise 3x3 + pointwise.
    """

    def __init__(self, in_channels: list[int], channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        width = sum(in_channels)
        self.dilations = dilations
        self.branches = nn.ModuleList(
            nn.Sequential(
                StagedConv1x1(in_channels, channels),
                nn.BatchNorm2d(channels),
            )
            if dilation == 1
            else nn.Sequential(
                nn.Sequential(
                    DilatedDepthwiseConv(width, dilation),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ),
                nn.Sequential(Conv1x1(width, channels), nn.BatchNorm2d(channels)),
            )
            for dilation in dilations
        )
        self.bottleneck = conv_norm_act(len(dilations) * channels, channels, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i), finest first -> (B, C, h_0, w_0)."""
        whole = None
        if set(self.dilations) != {1}:
            size = features[0].shape[-2:]
            # Lowered once: every branch would keep a copy of its own for the backward.
            whole = lowered(torch.cat([resize(feature, size) for feature in features], 1))
        joined = torch.cat(
            [
                branch(features if dilation == 1 else whole)
                for branch, dilation in zip(self.branches, self.dilations, strict=True)
            ],
            1,
        )
        # The branches' last ReLU is one over all, whose output alone is kept for the backward.
        return self.bottleneck(joined.relu_())


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
        self.fusion = SeparableASPP([channels] * len(in_channels), channels, dilations)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i), finest first -> logits (B, C, h_0, w_0)."""
        embedded = [
            embedding(feature) for embedding, feature in zip(self.embeddings, features, strict=True)
        ]
        return self.classifier(self.dropout(self.fusion(embedded)))
