"""Pictures of a step and of predictions, for people who would rather look than read."""

import io
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sepico.taxonomies import Taxonomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def step_panel(pictures: dict[str, Tensor], taxonomy: Taxonomy) -> bytes:
    """PNG of a step: one row a slot (two at most), one column a picture.

    `pictures` maps a title to images (B, 3, H, W) in 0..1, integer label maps (B, H, W), or
    float32 weights (B, H, W).
    """
    rows = min(2, *(len(picture) for picture in pictures.values()))
    grid = [
        [
            (title.replace("_", " "), _to_rgb(picture[row], taxonomy))
            for title, picture in pictures.items()
        ]
        for row in range(rows)
    ]
    return image_grid(grid, taxonomy)


def _to_rgb(picture: Tensor, taxonomy: Taxonomy) -> np.ndarray:
    picture = picture.detach().cpu()
    if picture.ndim == 3:
        return (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    if picture.is_floating_point():
        return np.repeat((picture.clamp(0, 1) * 255).byte().numpy()[..., None], 3, -1)
    return taxonomy.paint(picture.numpy())


def error_map(prediction: np.ndarray, truth: np.ndarray, ignore_index: int) -> np.ndarray:
    """Label maps (H, W) -> (H, W, 3) uint8: wrong pixels red, right ones grey, unlabelled black."""
    picture = np.where(prediction == truth, 90, 0).astype(np.uint8)[..., None].repeat(3, -1)
    picture[(prediction != truth)] = (220, 30, 30)
    picture[truth == ignore_index] = 0
    return picture


def confusion_picture(counts: Tensor, taxonomy: Taxonomy) -> bytes:
    """PNG of a confusion matrix (C, C): of each true class (rows), percent predicted as each."""
    shares = 100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    side = 2.2 + 0.42 * taxonomy.num_classes
    figure = _figure((side, side), 110)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    ticks = range(taxonomy.num_classes)
    axes.set_xticks(ticks, taxonomy.names, rotation=90, fontsize=7)
    axes.set_yticks(ticks, taxonomy.names, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    for row, column in (shares >= 0.5).nonzero().tolist():
        share = shares[row, column].item()
        color = "white" if share > 50 else "black"
        axes.text(column, row, f"{share:.0f}", color=color, ha="center", va="center", fontsize=6)
    return _png(figure)


def _figure(size: tuple[float, float], dpi: int) -> "Figure":
    # Imported here: it is most of a second of every worker's start, and few of them draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def image_grid(grid: list[list[tuple[str, np.ndarray]]], taxonomy: Taxonomy) -> bytes:
    """PNG of titled (H, W, 3) uint8 images in rows, with the classes' colours below."""
    from matplotlib.patches import Patch

    height, width = grid[0][0][1].shape[:2]
    columns = max(len(row) for row in grid)
    size = (columns * 2.4, len(grid) * (2.4 * height / width + 0.3) + 0.5)
    figure = _figure(size, 100)
    axes = figure.subplots(len(grid), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis_row, row in zip(axes, grid, strict=True):
        for axis, (title, image) in zip(axis_row, row, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    patches = [
        Patch(color=np.array(color) / 255, label=name)
        for name, color in zip(taxonomy.names, taxonomy.colors, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=7)
    return _png(figure)
