"""The whole system on a generated two-domain street-scene set: `python -m jobs.demo`.

No download, no account: local Ray, local files, a few minutes on two cores. Generates day scenes
with labels and night scenes without, trains source-only and SePiCo for the same number of steps,
and compares them on held-out night scenes.
"""

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from cluster.config import TrainConfig
from cluster.evaluation import Output, evaluate_tasks, load_network, tasks_of_run
from cluster.ingest import IngestConfig, ingest
from cluster.reader import open_reader
from cluster.storage import StorageConfig, open_storage
from cluster.training import train
from cluster.urls import absolute_url
from cluster.workers import connect_ray, room
from jobs.command_line import parse, run
from jobs.street_scenes import TAXONOMY, write_dataset
from sepico.panels import image_grid
from sepico.prediction import Predictor

# name: (domain, images, labelled)
DATA_SETS = {
    "day": ("day", 240, True),
    "night": ("night", 160, False),
    "night_val": ("night", 48, True),
}
METHODS = {"source-only": "source_only", "SePiCo": "distcl"}


@dataclass
class DemoConfig:
    """The demo.

    Attributes:
        folder: Where the generated images, shards, runs and the picture go.
        seed: Seed of the scenes and of both runs.
        workers: Ray Train workers; fewer where there are fewer GPUs or cores, or where they
            would not share a batch evenly.
    """

    folder: str = "demo"
    seed: int = 1
    workers: int = 2


def main(config: DemoConfig) -> None:
    """Generate, ingest, train twice, evaluate, print the table and write the picture."""
    root = Path(config.folder) / f"seed{config.seed}"
    connect_ray()
    config = replace(config, workers=_workers(config))
    data = {name: _make(root, name, config.seed) for name in DATA_SETS}
    runs = {name: _train(config, root, data, method) for name, method in METHODS.items()}
    storage = StorageConfig()
    tasks = [
        task
        for url in runs.values()
        for task in tasks_of_run(url, data["night_val"], data["night"], storage)
    ]
    output = Output(absolute_url(str(root / "evaluation")))
    rows, _ = evaluate_tasks(tasks, storage, config.workers, output)
    trained, adapted = rows[0::2], rows[1::2]
    results = {
        name: (trained[i]["student"]["miou"], adapted[i]["student + AdaBN"]["miou"])
        for i, name in enumerate(runs)
    }
    (root / "results.json").write_text(json.dumps(results, indent=1))
    picture = root / "comparison.png"
    picture.write_bytes(_picture(data["night_val"], runs))
    print(f"\nmIoU on {DATA_SETS['night_val'][1]} held-out night scenes, seed {config.seed}")
    print(f"{'':<14}{'as trained':>12}{'AdaBN':>10}")
    for name, values in results.items():
        print(f"{name:<14}{values[0]:>12.1f}{values[1]:>10.1f}")
    print(f"picture: {picture}")


def dry_run(config: DemoConfig) -> None:
    """Build what the demo trains, without data, and print what it would be."""
    from cluster.dry_run import describe  # imports DeepSpeed, which a driver never needs

    base = _base(config, METHODS["SePiCo"])
    describe(replace(base, model=replace(base.model, num_classes=TAXONOMY.num_classes)))


def _workers(config: DemoConfig) -> int:
    """As many as were asked for, fit, and share a batch evenly."""
    batch = _base(replace(config, workers=1), METHODS["SePiCo"]).optimization.global_batch
    most = min(config.workers, room(cpus=1))
    return max((n for n in range(1, most + 1) if batch % n == 0), default=config.workers)


def _make(root: Path, name: str, seed: int) -> str:
    """Generate and ingest one data set; its URL. What is there already is kept."""
    domain, count, labelled = DATA_SETS[name]
    url = absolute_url(str(root / "shards" / name))
    if not open_storage(url, StorageConfig()).exists("manifest.arrow"):
        images = root / "images" / name
        write_dataset(
            images, domain=domain, count=count, seed=10 * seed + list(DATA_SETS).index(name)
        )
        ingest(IngestConfig(root=str(images), labels=labelled, to=url))
    return url


def _train(config: DemoConfig, root: Path, data: dict[str, str], method: str) -> str:
    base = _base(config, method)
    run = replace(
        base,
        run=method,
        runs=str(root / "runs"),
        data=replace(base.data, source=data["day"], target=data["night"]),
    )
    return train(run)["run"]


def _base(config: DemoConfig, method: str) -> TrainConfig:
    preset = str(files("jobs").joinpath("presets", "demo.yaml"))
    base = parse(TrainConfig, ["--config", preset])
    return replace(base, method=method, workers=config.workers, seed=config.seed)


def _picture(data_url: str, runs: dict[str, str]) -> bytes:
    """Night scene, truth and each run's prediction, a row a scene."""
    storage = StorageConfig()
    reader = open_reader(data_url, storage)
    taxonomy = reader.manifest.taxonomy
    predictors = {
        name: Predictor(load_network(url, storage), taxonomy) for name, url in runs.items()
    }
    grid = []
    for sample in map(reader.read, range(3)):
        scene, truth = sample.image.permute(1, 2, 0).numpy(), taxonomy.paint(sample.label.numpy())
        row = [("night scene", scene), ("truth", truth)]
        for name, predictor in predictors.items():
            (found,) = predictor.predict_batch(sample.image[None])
            row.append((name, found.colored()))
        grid.append(row)
    return image_grid(grid, taxonomy)


if __name__ == "__main__":
    run(main, DemoConfig, dry_run=dry_run)
