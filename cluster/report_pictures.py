"""The charts of a report, as SVG or PNG bytes."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from sepico.taxonomies import Taxonomy

if TYPE_CHECKING:
    from cluster.report import ReportedRun

# Title of a chart -> the metrics in it, each with a line style.
CURVES = {
    "mIoU on the validation set, %": {"student_miou": "-", "teacher_miou": ":"},
    "cross entropy": {"source_ce": "-", "mix_ce": ":"},
    "contrast": {"source_contrast": "-", "target_contrast": ":"},
    "teacher: confidence, right where known": {
        "teacher_confidence": "-",
        "pseudo_label_accuracy": ":",
    },
    "learning rate": {"learning_rate": "-"},
    "images a second": {"images_per_second": "-"},
}
COLORS = colormaps["tab10"].colors


def curves(runs: "list[ReportedRun]") -> bytes:
    """A chart for each of CURVES, a colour a run."""
    figure = Figure((11, 5.6), layout="constrained")
    for axes, (title, metrics) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for color, run in zip(COLORS, runs, strict=False):
            for metric, style in metrics.items():
                if curve := run.curve(metric):
                    dots = "." if len(curve) < 10 else ""  # one value alone is no line
                    points = zip(*curve, strict=True)
                    axes.plot(*points, style + dots, color=color, linewidth=1.1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(metrics) > 1:
            lines = [Line2D([], [], color="grey", linestyle=style) for style in metrics.values()]
            names = [metric.replace("_", " ") for metric in metrics]
            axes.legend(lines, names, fontsize=7, frameon=False)
    handles = [
        Line2D([], [], color=color, label=run.name)
        for color, run in zip(COLORS, runs, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return _svg(figure)


def iou_bars(rows: dict[str, dict[str, dict[str, Any]]], classes: tuple[str, ...]) -> bytes:
    """Grouped bars: of each class and the mean, every row of every run."""
    bars = {
        f"{run}: {name}": [row["iou"].get(label) for label in classes] + [row["miou"]]
        for run, of_run in rows.items()
        for name, row in of_run.items()
    }
    figure = Figure((11, 3.6), layout="constrained")
    axes = figure.subplots()
    places, width = np.arange(len(classes) + 1), 0.8 / max(len(bars), 1)
    for i, (name, values) in enumerate(bars.items()):
        heights = [0 if value is None else value for value in values]
        color = colormaps["tab20"](i % 20)
        axes.bar(places + (i + 0.5) * width - 0.4, heights, width, label=name, color=color)
    axes.set_xticks(places, [*classes, "mean"], rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("IoU, %", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", alpha=0.25)
    if bars:
        figure.legend(loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    return _svg(figure)


def embedding_maps(maps: dict[str, tuple[Tensor, Tensor, Tensor]], taxonomy: Taxonomy) -> bytes:
    """Side by side, a map a run: source pixels as dots, target pixels as crosses."""
    figure = Figure((5.2 * len(maps), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    palette = np.array(taxonomy.colors) / 255
    for axes, (name, (places, classes, of_target)) in zip(
        figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True
    ):
        for marker, shown in (("o", ~of_target), ("x", of_target)):
            x, y = places[shown].T.numpy()
            colors = palette[classes[shown].numpy()]
            axes.scatter(x, y, s=14, c=colors, marker=marker, linewidths=0.9, alpha=0.8)
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    handles = [
        Line2D([], [], marker="o", linestyle="", color="black", label="source"),
        Line2D([], [], marker="x", linestyle="", color="black", label="target"),
        *(
            Line2D([], [], marker="s", linestyle="", color=color, label=label)
            for label, color in zip(taxonomy.names, palette, strict=True)
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
