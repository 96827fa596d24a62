"""Projection head: encoder features -> unit-norm pixel embeddings for the contrast."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepico.heads.daformer import conv_norm_act


class ProjectionHead(nn.Module):
    """Two 1x1 convolutions with batch-norm and ReLU, a linear 1x1 convolution, L2 norm.

    Several input stages are resized to the first one's grid and concatenated.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_act(sum(in_channels), channels),
            conv_norm_act(channels, channels),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i) -> (B, A, h_0, w_0) float32 with unit norm along A."""
        size = features[0].shape[-2:]
        resized = [features[0]] + [
            F.interpolate(feature, size, mode="bilinear", align_corners=False)
            for feature in features[1:]
        ]
        return F.normalize(self.layers(torch.cat(resized, 1)).float(), dim=1)
