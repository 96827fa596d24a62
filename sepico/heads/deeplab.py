"""DeepLab-v2 decode head: parallel dilated convolutions on the last stage, summed.

Chen et al.: DeepLab (TPAMI 2018), section 3.2 (ASPP); the encoder runs at output stride 8.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeepLabV2Head(nn.Module):
    """One 3x3 convolution to the classes a dilation; their logits are added."""

    dilations = (6, 12, 18, 24)  # as published

    def __init__(self, in_channels: int, num_classes: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i), finest first -> logits (B, C, h_-1, w_-1)."""
        feature = features[-1]
        size = feature.shape[-2:]
        # A convolution to 19 channels leaves most of the hardware idle. Every tap of every branch
        # is a 1x1 convolution, so one wide one computes them all; what is left is to shift and add
        # their small results, which `fold` does, with the taps of the kernel reversed.
        kernels = torch.stack([branch.weight for branch in self.branches]).flip(-2, -1)
        taps = kernels.permute(0, 1, 3, 4, 2).flatten(0, 3) @ feature.flatten(2)
        logits = sum(branch.bias for branch in self.branches).view(1, -1, 1, 1)
        of_branches = taps.float().chunk(len(self.branches), 1)
        for branch, of_branch in zip(self.branches, of_branches, strict=True):
            logits = logits + F.fold(
                of_branch, size, 3, dilation=branch.dilation, padding=branch.padding
            )
        return logits
