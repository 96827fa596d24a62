"""Evaluate runs on a labelled set: from a configuration to confusion matrices and a report."""

import json
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import torch
import xxhash

from cluster.checkpoint_format import Checkpoint, list_checkpoints, read_weights
from cluster.shards import read_manifest
from cluster.storage import StorageConfig, StorageError, absolute_url, open_storage
from cluster.training import connect_ray, launch, load_config, place, run_url
from sepico.config import ModelConfig
from sepico.metrics import ConfusionMatrix
from sepico.network import Segmentor, build_segmentor
from sepico.taxonomies import Taxonomy


@dataclass
class EvaluateConfig:
    """An evaluation of a run's newest checkpoint.

    Attributes:
        run: Name (a folder below `runs`) or URL of the run.
        runs: URL of the folder that holds runs given by name.
        data: URL of a labelled data set; empty takes the run's validation set.
        adapt_data: URL of images of the target domain; adds rows with batch-norm statistics
            re-estimated on them (AdaBN).
        workers: Ray Train workers; one GPU each where the cluster has GPUs.
    """

    run: str = ""
    runs: str = "runs"
    data: str = ""
    adapt_data: str = ""
    workers: int = 1
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is not set: give --run NAME_OR_URL of a trained run")


@dataclass
class EvaluationTask:
    """One run's networks on one labelled data set, as trained or after AdaBN."""

    run_url: str
    num_classes: int
    precision: str
    checkpoint: Checkpoint
    data: str
    adapt_data: str = ""  # URL of the images for AdaBN, empty for "as trained"


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    """Evaluate one run; writes the report to the run folder and returns it and its URL.

    The report holds, per row ("student", "teacher", each also "+ AdaBN"), mIoU and the IoU of
    every class in percent (null where a class is neither there nor predicted).
    Raises ValueError, in one line, before any worker starts.
    """
    run = open_storage(run_url(config.run, config.runs), config.storage)
    run.check()
    trained = load_config(run)
    data = absolute_url(config.data or trained["validation"]["data"] or _missing_data())
    tasks = tasks_of_run(run.url, data, config.adapt_data, config.storage)
    rows, taxonomy = evaluate_tasks(tasks, config.storage, config.workers, folder=run.url)
    report = {
        "run": run.url,
        "data": data,
        "step": tasks[0].checkpoint.step,
        "classes": list(taxonomy.names),
        "rows": {name: row for task_rows in rows for name, row in task_rows.items()},
    }
    # Two data sets may share their last folder's name.
    digest = xxhash.xxh3_64_hexdigest(f"{data} {config.adapt_data}".encode())[:8]
    key = f"evaluation/{PurePosixPath(data).name}-{digest}.json"
    run.put(key, json.dumps(report, indent=1).encode())
    return report, f"{run.url}/{key}"


def tasks_of_run(
    url: str, data: str, adapt_data: str, storage: StorageConfig
) -> list[EvaluationTask]:
    """Tasks of one run: as trained and, with `adapt_data`, after AdaBN."""
    run = open_storage(url, storage)
    trained = load_config(run)
    done = list_checkpoints(run)
    if not done:
        raise StorageError(f"run {run.url} has no checkpoint yet: let it train to its first")
    adaptations = [""] + ([absolute_url(adapt_data)] if adapt_data else [])
    return [
        EvaluationTask(
            run.url,
            trained["model"]["num_classes"],
            trained["engine"]["precision"],
            done[-1],
            data,
            adaptation,
        )
        for adaptation in adaptations
    ]


def networks_of(checkpoint: Checkpoint) -> list[str]:
    """Which of "student" and "teacher" a checkpoint holds."""
    names = ("student", "teacher")
    return [name for name in names if f"{name}.safetensors" in checkpoint.files]


def load_network(
    url: str, storage: StorageConfig, name: str = "student", checkpoint: Checkpoint | None = None
) -> Segmentor:
    """A network of a run's checkpoint (the newest) in eval mode, without its projection head."""
    run = open_storage(url, storage)
    weights = read_weights(run, checkpoint or list_checkpoints(run)[-1], name)
    model = replace(ModelConfig(**load_config(run)["model"]), encoder_weights=None)
    network = build_segmentor(model, with_projection=False)
    network.load_state_dict(
        {key: value for key, value in weights.items() if not key.startswith("projection.")}
    )
    return network.eval()


def evaluate_tasks(
    tasks: list[EvaluationTask], storage: StorageConfig, workers: int, *, folder: str
) -> tuple[list[dict[str, dict[str, Any]]], Taxonomy]:
    """Run tasks of one data set on one worker group; rows per task, and the classes."""
    store = open_storage(tasks[0].data, storage)
    store.check()
    manifest = read_manifest(store)
    if not manifest.labelled:
        raise ValueError(f"{store.url} has no labels: evaluate on a labelled data set")
    for url in {task.adapt_data for task in tasks if task.adapt_data}:
        read_manifest(open_storage(url, storage))
    for task in tasks:
        if task.num_classes != manifest.taxonomy.num_classes:
            raise ValueError(
                f"{task.run_url} was trained on {task.num_classes} classes, {store.url} has "
                f"{manifest.taxonomy.num_classes}"
            )
    connect_ray()
    cpus = place(workers)
    results = launch(
        "cluster.inference:evaluate_worker",
        {"tasks": tasks, "storage": storage, "cpus": cpus},
        workers=workers,
        cpus=cpus,
        storage=storage,
        folder=f"{folder}/evaluation/ray",
    )
    rows = [
        {
            f"{name}{' + AdaBN' if task.adapt_data else ''}": _row(counts, manifest.taxonomy)
            for name, counts in networks.items()
        }
        for task, networks in zip(tasks, results, strict=True)
    ]
    return rows, manifest.taxonomy


def _row(counts: list[list[int]], taxonomy: Taxonomy) -> dict[str, Any]:
    matrix = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
    matrix.counts = torch.tensor(counts)
    iou = [None if value != value else round(100 * value, 2) for value in matrix.iou().tolist()]
    return {
        "miou": round(100 * matrix.mean_iou(), 2),
        "iou": dict(zip(taxonomy.names, iou, strict=True)),
    }


def _missing_data() -> str:
    raise ValueError("data is not set and the run has no validation set: give --data URL")
