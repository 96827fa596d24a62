"""Maps of pixel features in the plane: which pixels to show, and PCA and t-SNE of them."""

from typing import Literal

import torch
from torch import Tensor, nn

from sepico.losses import select_pixels
from sepico.network import Segmentor

Method = Literal["tsne", "pca"]
STRIDE = 32  # images are cropped to whole multiples of the coarsest grid


@torch.no_grad()
def pixel_features(network: Segmentor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, A), of unit length, and classes (N,) of the pixels that a contrast would keep.

    Those of the projection head; of a network without one, what its classifier reads. `images` are
    (B, 3, H, W) float32 on the 0..1 scale, `labels` (B, 1, H, W) int64 with 255 for none.
    """
    height, width = (size // STRIDE * STRIDE for size in images.shape[-2:])
    images, labels = images[..., :height, :width], labels[..., :height, :width]
    read: list[Tensor] = []
    classifier = getattr(network.head, "classifier", network.head)
    hook = classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    projections = network(network.normalize(images))[1]
    hook.remove()
    if projections is None:
        features = read[0][-1] if isinstance(read[0], list) else read[0]
    else:
        features = projections[-1] if isinstance(projections, list) else projections
    rows, classes = select_pixels(
        features.float(), labels, num_classes=network.num_classes, min_ratio=0.75
    )
    return nn.functional.normalize(rows, dim=1), classes


def draw_pixels(classes: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of up to `per_class` pixels of each class in `classes` (N,), drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=generator)
    drawn = [order[classes[order] == label][:per_class] for label in classes.unique()]
    return torch.cat(drawn) if drawn else order


def flatten_features(features: Tensor, method: Method) -> Tensor:
    """Features (N, A) -> places in the plane (N, 2), each axis scaled to -1..1."""
    places = _pca(features.double(), 2) if method == "pca" else _tsne(features.double())
    places = places - places.mean(0)
    return (places / places.abs().amax(0).clamp(min=1e-12)).float()


def _pca(features: Tensor, width: int) -> Tensor:
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :width] * s[:width]


def _tsne(features: Tensor, perplexity: float = 30.0, iterations: int = 400) -> Tensor:
    """Exact t-SNE from the first principal components (van der Maaten and Hinton, JMLR 2008)."""
    count = len(features)
    near = _affinities(torch.cdist(features, features).square(), min(perplexity, (count - 1) / 3))
    near = ((near + near.T) / (2 * count)).clamp(min=1e-12)
    places = _pca(features, 2)
    places = 1e-4 * places / places.std(0).clamp(min=1e-12)
    velocity, gains = torch.zeros_like(places), torch.ones_like(places)
    rate = max(count / 48, 50.0)
    for step in range(iterations):
        exaggeration, momentum = (12.0, 0.5) if step < 100 else (1.0, 0.8)
        kernel = 1 / (1 + torch.cdist(places, places).square())
        kernel.fill_diagonal_(0)
        pull = (exaggeration * near - kernel / kernel.sum()) * kernel
        gradient = 4 * (pull.sum(1, keepdim=True) * places - pull @ places)
        agree = gradient * velocity > 0
        gains = torch.where(agree, gains * 0.8, gains + 0.2).clamp(min=0.01)
        velocity = momentum * velocity - rate * gains * gradient
        places = places + velocity
    return places


def _affinities(distances: Tensor, perplexity: float) -> Tensor:
    """Rows of Gaussian neighbour probabilities (N, N), each with this perplexity."""
    low, high = torch.zeros(len(distances), 1), torch.full((len(distances), 1), 1e6)
    low, high = low.double(), high.double()
    others = ~torch.eye(len(distances), dtype=torch.bool)
    for _ in range(60):
        beta = (low + high) / 2
        scores = (-beta * distances).masked_fill(~others, -torch.inf)
        rows = scores.softmax(1)
        entropy = -(rows * rows.clamp(min=1e-300).log()).sum(1, keepdim=True)
        flat = entropy > torch.tensor(perplexity).log()
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
    return rows
