"""Projection head: encoder features -> unit-norm pixel embeddings for the contrast."""

from torch import Tensor, nn
from torch.nn import functional as F

from sepico.heads.layers import StagedConv1x1, conv_norm_act


class ProjectionHead(nn.Module):
    """Two 1x1 convolutions with batch-norm and ReLU, L2 norm.

    Several input stages are resized to the first one's grid and concatenated; the hidden width is
    their mean width, as the authors choose it. Embeddings have no negative entry.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        hidden = sum(in_channels) // len(in_channels)
        self.reduce = StagedConv1x1(in_channels, hidden)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), conv_norm_act(hidden, channels)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """List of (B, C_i, h_i, w_i) -> (B, A, h_0, w_0) float32 with unit norm along A."""
        return F.normalize(self.layers(self.reduce(features)).float(), dim=1)


class PerLayerProjection(nn.Module):
    """A projection head of its own for every stage, on that stage's grid."""

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead([width], channels) for width in in_channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """List of (B, C_i, h_i, w_i) -> list of (B, A, h_i, w_i) float32, unit norm along A."""
        return [head([feature]) for head, feature in zip(self.heads, features, strict=True)]
