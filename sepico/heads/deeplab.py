"""DeepLab-v2 decode head: parallel dilated convolutions on the last stage, summed.

Chen et al.: DeepLab (TPAMI 2018), section 3.2 (ASPP); the encoder runs at output stride 8.
"""

from torch import Tensor, nn


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
        return sum(branch(features[-1]) for branch in self.branches)
