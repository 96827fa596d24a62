"""Pictures of a step and of predictions, for people who would rather look than read."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sepico.taxonomies import Taxonomy


def step_panel(pictures: dict[str, Tensor], taxonomy: Taxonomy, rows: int = 2) -> bytes:
    """PNG of a step: one row a slot, one column a picture.

    `pictures` maps a title to images (B, 3, H, W) in 0..1, integer label maps (B, H, W), or
    float32 weights (B, H, W).
    """
    rows = min(rows, *(len(picture) for picture in pictures.values()))
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


def image_grid(grid: list[list[tuple[str, np.ndarray]]], taxonomy: Taxonomy) -> bytes:
    """PNG of titled (H, W, 3) uint8 images in rows, with the classes' colours below."""
    height, width = grid[0][0][1].shape[:2]
    columns = max(len(row) for row in grid)
    size = (columns * 2.4, len(grid) * (2.4 * height / width + 0.3) + 0.5)
    figure = Figure(size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
