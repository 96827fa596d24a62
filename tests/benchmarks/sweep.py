"""What a sweep costs: shared warm-up and early stopping against the full grid without them.

    python tests/benchmarks/sweep.py [--folder DIR]

Both search the same grid of temperatures and weights on a small generated day-night set, one worker
a trial, and count worker-seconds, from asking for a worker to its end. Steps are given too: where a
trial lasts seconds, much of its time is the start of its worker.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from cluster.ingest import IngestConfig, ingest
from cluster.storage import StorageConfig, open_storage
from cluster.sweep import sweep
from cluster.sweep_config import SweepConfig
from cluster.sweep_results import Ranking
from cluster.workers import connect_ray
from jobs.command_line import parse
from jobs.street_scenes import write_dataset

SPACE = """
contrast.temperature: {choice: [0.1, 1.0, 10.0, 100.0]}
contrast.weight: {choice: [0.1, 0.5, 1.0, 3.0]}
"""
SETS = {"day": ("day", 60, True), "night": ("night", 40, False), "night_val": ("night", 16, True)}
TASK = {
    "config": "demo",
    "workers": "1",
    "cpus_per_worker": "1",
    "optimization.iterations": "800",
    "optimization.global_batch": "4",
    "optimization.reference_batch": "4",
    "contrast.start": "260",
    "checkpoint_every": "1000",
    "panel_every": "1000",
    "validation.every": "1000",
    "search.algorithm": "grid",
    "search.top": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=tempfile.mkdtemp(prefix="sweep-"))
    root = Path(parser.parse_args().folder)
    print(f"{os.cpu_count()} cores, {os.uname().machine}; {root}")
    connect_ray()
    data = {name: make(root, name) for name in SETS}
    plain = {"search.early_stopping": "false", "search.share_warm_up": "false"}
    ours = run(root / "shared", data, {})
    grid = run(root / "grid", data, plain)
    for title, ranking in (("shared and stopped", ours), ("full grid", grid)):
        best = max(
            record.last("student_miou")
            for record in ranking.records
            if not math.isnan(record.last("student_miou"))
        )
        cost = f"{seconds(ranking):.0f} worker-seconds, {steps(ranking)} steps"
        print(f"{title}: {cost}, best mIoU {best:.2f}")
    print(f"ratio of worker-seconds {seconds(ours) / seconds(grid):.2f}, aim 0.35")
    print(f"ratio of steps {steps(ours) / steps(grid):.2f}")


def run(folder: Path, data: dict[str, str], changed: dict[str, str]) -> Ranking:
    keys = {
        **TASK,
        **changed,
        "data.source": data["day"],
        "data.target": data["night"],
        "validation.data": data["night_val"],
        "run": str(folder),
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    began = time.monotonic()
    ranking = sweep(parse(SweepConfig, words), SPACE)
    print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return ranking


def seconds(ranking: Ranking) -> float:
    return sum(record.worker_seconds for record in ranking.records)


def steps(ranking: Ranking) -> int:
    start = ranking.plan.start
    done = 0
    for record in ranking.records:
        last = max(map(int, record.measured), default=start)
        done += (last - start if record.warm_up else last) if record.is_trial else start
    return done


def make(root: Path, name: str) -> str:
    domain, count, labelled = SETS[name]
    url = (root / "data" / name).absolute().as_uri()
    if not open_storage(url, StorageConfig()).exists("manifest.arrow"):
        images = root / "images" / name
        write_dataset(images, domain=domain, count=count, seed=list(SETS).index(name))
        ingest(IngestConfig(root=str(images), labels=labelled, to=url))
    return url


if __name__ == "__main__":
    main()
