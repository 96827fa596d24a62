"""The files that a finished sweep leaves beside its runs."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from cluster.storage import Storage
from cluster.sweep_report import write_report
from cluster.sweep_results import Ranking, trials_csv
from cluster.sweep_space import with_values

# Which run, and how it began, is not a preset's business.
_OF_A_RUN = ("run", "runs", "fork")


def write_results(ranking: Ranking, sweep: Storage) -> None:
    """trials.csv, and if a trial came to its end best.yaml, report.html and tensorboard/."""
    sweep.put("trials.csv", trials_csv(ranking))
    if ranking.best is None:
        return
    sweep.put("best.yaml", best_preset(ranking).encode())
    sweep.put("report.html", write_report(ranking).encode())
    with tempfile.TemporaryDirectory(prefix="hparams-") as folder:
        write_hparams(ranking, Path(folder))
        for path in sorted(Path(folder).rglob("events*")):
            sweep.put(f"tensorboard/{path.relative_to(folder)}", path.read_bytes())


def best_preset(ranking: Ranking) -> str:
    """The whole configuration of the best trial, for `python -m jobs.train --config`."""
    plan, best = ranking.plan, ranking.best
    # Through JSON, which has lists for tuples as YAML has.
    config = json.loads(json.dumps(asdict(with_values(plan.base, best.point))))
    for key in _OF_A_RUN:
        del config[key]
    spread = f", spread {best.spread:.2f}" if len(best.values) > 1 else ""
    head = (
        f"# The best of sweep {plan.url}: {plan.objective} {best.mean:.2f}{spread},\n"
        f"# mean of {len(best.values)} seed(s). Found: {json.dumps(best.point)}\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False)


def write_hparams(ranking: Ranking, folder: Path) -> None:
    """TensorBoard's table of hyper-parameters: an event file a trial."""
    plan = ranking.plan
    for record in ranking.records:
        if not record.is_trial or not record.measured:
            continue
        hparams = {key.name: str(record.point.get(key.name, "")) for key in plan.space.keys}
        hparams |= {k: v for k, v in record.point.items() if isinstance(v, int | float | str)}
        step = max(record.measured, key=int)
        metrics = {f"sweep/{name}": value for name, value in record.measured[step].items()}
        with SummaryWriter(str(folder / record.name)) as writer:
            writer.add_hparams(
                hparams | {"seed": record.seed}, metrics, run_name=".", global_step=int(step)
            )
