"""report.html of a sweep: one file that asks nothing of a network."""

import html
import math

from cluster.evaluation import Output, evaluate_tasks, tasks_of_run
from cluster.manifest import read_manifest
from cluster.report_html import table
from cluster.storage import open_storage
from cluster.sweep_config import MEASURES
from cluster.sweep_figures import (
    bars,
    class_bars,
    objective_over_trials,
    parallel_coordinates,
    response,
)
from cluster.sweep_progress import describe
from cluster.sweep_records import FINISHED
from cluster.sweep_results import Entry, Ranking, importances, rank_correlation, warm_up_saving

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222;
  padding: 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
td:last-child, th:last-child { text-align: left; }
svg { max-width: 100%; height: auto; }
p.note { color: #666; font-size: .85rem; }
"""


def write_report(ranking: Ranking) -> str:
    """The whole page."""
    plan = ranking.plan
    sections = [_summary(ranking)]
    sections.append(_section("Objective over trials", objective_over_trials(ranking)))
    sections.append(_section("Parallel coordinates", parallel_coordinates(ranking)))
    numeric = [key for key in plan.space.keys if key.distribution != "choice"]
    shown = [key for key in numeric if key.name == "contrast.temperature"] or numeric[:1]
    for key in shown:
        sections.append(_section(f"Response to {key.name}", response(ranking, key)))
    step, shares = importances(ranking)
    if shares:
        note = (
            f"PED-ANOVA (Watanabe et al., IJCAI 2023) of all trials at step {step}: which keys "
            "tell the better trials from the rest."
        )
        label = "share of importance"
        sections.append(_section("Importance of keys", bars(shares, label), note))
    if classes := _class_ious(ranking):
        sections.append(_section("IoU per class, best against the sweep's own", classes))
    sections.append(_section("Proxies without labels", _proxies(ranking), PROXIES))
    sections.append(_section("Configurations", _table(ranking)))
    title = html.escape(f"Sweep {plan.url}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f"<body><h1>Sweep</h1>\n{''.join(sections)}</body></html>\n"
    )


PROXIES = (
    "Rank correlation (Spearman) of what a validation measures without labels with its mIoU, over "
    "the trials that came to a step. Near 1 (entropy: near -1) a sweep can do without "
    "labels."
)


def _section(title: str, body: str, note: str = "") -> str:
    note = note and f'<p class="note">{html.escape(note)}</p>'
    return f"<h2>{html.escape(title)}</h2>\n{note}{body}\n"


def _summary(ranking: Ranking) -> str:
    best, default, objective = ranking.best, ranking.default, ranking.plan.objective
    trials = [record for record in ranking.records if record.is_trial]
    total = sum(record.worker_seconds for record in ranking.records)
    lines = [
        f"{html.escape(ranking.plan.url)}: {len(trials)} trials, "
        f"{sum(r.status == FINISHED for r in trials)} of them to the end, "
        f"{sum(r.status == 'failed' for r in trials)} failed, {total:.0f} worker-seconds.",
        f"Best by {objective}: <b>{_value(best)}</b> with {html.escape(describe(best.point))}.",
    ]
    if default is not None and default.complete:
        lines.append(f"The configuration the sweep began with: {_value(default)}.")
    seconds, forks, saved = warm_up_saving(ranking)
    if forks:
        lines.append(
            f"Warm-ups took {seconds:.0f} worker-seconds and served {forks} trials: {saved:.0f} "
            "worker-seconds saved."
        )
    return f"<p>{'<br>'.join(lines)}</p>"


def _value(entry: Entry) -> str:
    spread = "" if math.isnan(entry.spread) else f" &plusmn; {entry.spread:.2f}"
    return f"{entry.mean:.2f}{spread} ({len(entry.values)} seeds)"


def _class_ious(ranking: Ranking) -> str:
    """Bars of the best and the default, mean over seeds; empty without labels or default."""
    plan, default = ranking.plan, ranking.default
    data = plan.base.validation.data
    labelled = read_manifest(open_storage(data, plan.base.storage)).labelled
    groups = {"best": ranking.best, "the sweep's own": default}
    if not labelled or not all(entry and entry.complete for entry in groups.values()):
        return ""
    tasks = [
        task
        for entry in groups.values()
        for seed in ranking.seeds
        for task in tasks_of_run(entry.records[seed].run, data, "", plan.base.storage)
    ]
    rows, taxonomy = evaluate_tasks(
        tasks, plan.base.storage, plan.base.worker_range.max, Output(plan.url)
    )
    ious = [[row["student"]["iou"][name] for name in taxonomy.names] for row in rows]
    seeds = len(ranking.seeds)
    means = {
        label: [_mean(values) for values in zip(*ious[i * seeds : (i + 1) * seeds], strict=True)]
        for i, label in enumerate(groups)
    }
    return class_bars(list(taxonomy.names), means)


def _mean(values: tuple[float | None, ...]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _proxies(ranking: Ranking) -> str:
    trials = [record for record in ranking.records if record.is_trial]
    pairs = {
        f"step {step}": [r.measured[str(step)] for r in trials if str(step) in r.measured]
        for step in ranking.plan.stops
    }
    rows = []
    for network in ("student", "teacher"):
        for measure in MEASURES[1:]:
            cells = [f"{network}_{measure}"]
            for measured in pairs.values():
                known = [m for m in measured if f"{network}_miou" in m]
                values = [m[cells[0]] for m in known], [m[f"{network}_miou"] for m in known]
                found = rank_correlation(*values) if known else math.nan
                cells.append("-" if math.isnan(found) else f"{found:+.2f} (n = {len(known)})")
            rows.append(cells)
    return table(["", *pairs], rows)


def _table(ranking: Ranking) -> str:
    rows = []
    for place, entry in enumerate(ranking.entries, 1):
        for seed, record in sorted(entry.records.items()):
            reached = record.last(ranking.plan.objective)
            step = max(map(int, record.measured), default=0)
            mean = _value(entry).replace("&plusmn;", "+-") if entry.complete else ""
            rows.append(
                [place, mean, seed, f"{reached:.2f}", step, record.status, record.reason,
                 describe(entry.point)]
            )  # fmt: skip
    objective = ranking.plan.objective
    names = ["rank", "mean", "seed", objective, "step", "status", "reason", "configuration"]
    return table(names, rows)
