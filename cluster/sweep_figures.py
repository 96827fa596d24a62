"""Pictures of a sweep's report, each as one inline SVG."""

import io
import math
import re
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.sweep_records import FAILED, FINISHED, Record
from cluster.sweep_results import Ranking
from cluster.sweep_space import Key, value_of

BLUE, ORANGE, GREY = "#1f5fa8", "#d95f0e", "#9a9a9a"


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, which needs nothing from elsewhere; closes it."""
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


def _axes(width: float = 7.5, height: float = 3.4) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def objective_over_trials(ranking: Ranking) -> str:
    """The objective at each trial's last stop, in the order they ended, and the best so far."""
    objective = ranking.plan.objective
    trials = [record for record in ranking.records if record.is_trial]
    figure, axes = _axes()
    kinds: dict[str, tuple[str, str, Callable[[Record], bool]]] = {
        "to the end": ("o", BLUE, lambda r: r.status == FINISHED),
        "stopped early": ("o", "none", lambda r: r.status not in (FINISHED, FAILED)),
    }
    best, so_far = math.nan, []
    pick = np.fmin if ranking.plan.mode == "min" else np.fmax
    for record in trials:
        if record.status == FINISHED:
            best = float(pick(best, record.last(objective)))
        so_far.append(best)
    axes.step(range(1, len(trials) + 1), so_far, where="post", color=ORANGE, label="best so far")
    for label, (marker, face, belongs) in kinds.items():
        of_kind = [(i, r.last(objective)) for i, r in enumerate(trials, 1) if belongs(r)]
        if of_kind:
            x, y = zip(*of_kind, strict=True)
            axes.plot(x, y, marker, mfc=face, mec=BLUE, label=label)
    failed = [i for i, record in enumerate(trials, 1) if record.status == FAILED]
    for i in failed:
        axes.axvline(i, color="#c0392b", linestyle=":", label="failed" if i == failed[0] else None)
    axes.set(xlabel="trial", ylabel=objective)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def parallel_coordinates(ranking: Ranking) -> str:
    """A line a trial through its value of every key and the objective it reached."""
    objective, keys = ranking.plan.objective, ranking.plan.space.keys
    trials = [r for r in ranking.records if r.is_trial and not math.isnan(r.last(objective))]
    varied = [key for key in keys if len({str(r.point.get(key.name)) for r in trials}) > 1]
    columns = [_column(key, trials, ranking) for key in varied]
    reached = np.array([record.last(objective) for record in trials])
    low, high = reached.min(), reached.max()
    goodness = (reached - low) / (high - low or 1)
    columns.append((objective, goodness, [(0.0, f"{low:.1f}"), (1.0, f"{high:.1f}")]))
    figure, axes = plt.subplots(figsize=(max(7.5, 1.6 * len(columns)), 3.6))
    colours = plt.get_cmap("viridis")(1 - goodness if ranking.plan.mode == "min" else goodness)
    for i in np.argsort(reached) if ranking.plan.mode == "max" else np.argsort(-reached):
        axes.plot([values[i] for _, values, _ in columns], color=colours[i], linewidth=1.3)
    for x, (_, _, ticks) in enumerate(columns):
        axes.axvline(x, color="#555555", linewidth=0.8)
        for y, label in ticks:
            axes.annotate(label, (x, y), (4, 0), textcoords="offset points", fontsize=7)
    names = [name.replace(".", ".\n") for name, _, _ in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    return svg(figure)


def _column(
    key: Key, trials: list[Record], ranking: Ranking
) -> tuple[str, np.ndarray, list[tuple[float, str]]]:
    """A key's axis: its name, the trials' places on it (0..1) and its ticks."""
    own = value_of(ranking.plan.base, key.name)
    values = [record.point.get(key.name, own) for record in trials]
    if key.distribution == "choice":
        names = sorted({str(v) for v in values}, key=lambda name: (len(name), name))
        places = np.array([names.index(str(value)) for value in values])
        top = max(len(names) - 1, 1)
        return key.name, places / top, [(i / top, name) for i, name in enumerate(names)]
    numbers = np.array(values, dtype=float)
    scaled = np.log(numbers) if "log" in key.distribution else numbers
    span = scaled.max() - scaled.min() or 1
    ends = [(0.0, f"{numbers.min():.3g}"), (1.0, f"{numbers.max():.3g}")]
    return key.name, (scaled - scaled.min()) / span, ends


def response(ranking: Ranking, key: Key) -> str:
    """The objective over one key: points of single trials, mean and spread of repeated ones."""
    objective, own = ranking.plan.objective, value_of(ranking.plan.base, key.name)
    figure, axes = _axes()
    single = [
        (record.point.get(key.name, own), record.last(objective))
        for record in ranking.records
        if record.is_trial and not math.isnan(record.last(objective))
    ]
    x, y = zip(*single, strict=True)
    axes.plot(x, y, "o", color=GREY, markersize=4, alpha=0.7, label="one trial, its last rung")
    repeated = sorted(
        (entry.point.get(key.name, own), entry.mean, np.nan_to_num(entry.spread))
        for entry in ranking.entries
        if entry.complete
    )
    if repeated:
        x, y, spread = zip(*repeated, strict=True)
        label = f"mean and spread of {len(ranking.seeds)} seed(s), to the end"
        axes.errorbar(x, y, spread, fmt="o-", color=BLUE, capsize=3, label=label)
    if "log" in key.distribution:
        axes.set_xscale("log")
    axes.axvline(own, color=ORANGE, linestyle="--", linewidth=0.8, label="the sweep's own value")
    axes.set(xlabel=key.name, ylabel=objective)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def bars(values: dict[str, float], label: str) -> str:
    """Horizontal bars, largest first."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    figure, axes = _axes(height=0.6 + 0.35 * len(ordered))
    axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=BLUE)
    axes.set_xlabel(label)
    return svg(figure)


def class_bars(names: list[str], groups: dict[str, list[float]]) -> str:
    """Grouped bars: IoU in percent of every class, a group a configuration."""
    figure, axes = _axes(width=max(7.5, 0.7 * len(names)))
    width = 0.8 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(places, np.nan_to_num(values), width, label=label, color=(BLUE, GREY)[i])
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel("IoU, percent")
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)
