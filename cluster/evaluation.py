"""Evaluate networks on a data set: from a configuration to a report, or to a submission.

The networks are those of a run's checkpoint, or the one in a checkpoint file of the authors.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
import xxhash

from cluster.checkpoint_format import Checkpoint, newest_checkpoint
from cluster.checkpoint_weights import read_weights
from cluster.config import WorkerRange
from cluster.manifest import Manifest, open_manifest, read_manifest
from cluster.run_config import load_config
from cluster.storage import StorageConfig, open_storage, read_url
from cluster.submission import merge_parts
from cluster.urls import absolute_url, run_url
from cluster.workers import connect_ray, launch, place
from sepico.config import ModelConfig
from sepico.import_official import read_official
from sepico.metrics import ConfusionMatrix
from sepico.network import Segmentor, build_blank
from sepico.prediction import InferenceConfig
from sepico.taxonomies import Taxonomy


@dataclass
class EvaluateConfig:
    """An evaluation of a run's newest checkpoint, or of a checkpoint file of the authors.

    A set without labels is predicted into a zip file as the test servers of Dark Zurich and ACDC
    take it: 8-bit train ids, the same with 255 where they are unsure, 16-bit confidences.

    Attributes:
        run: Name (a folder below `runs`) or URL of the run.
        checkpoint: Path or URL of one of the authors' .pth files, in place of a run.
        runs: URL of the folder that holds runs given by name, and reports on checkpoint files.
        data: URL of a data set; empty takes the run's validation set.
        adapt_data: URL of images of the target domain; adds rows with batch-norm statistics
            re-estimated on them (AdaBN).
        workers: Ray Train workers; one GPU each where the cluster has GPUs.
        worst: How many of the images with the lowest mIoU are pictured.
        invalid_below: Confidence, 0..1, below which a submission marks a pixel as invalid.
        inference: How an image is predicted.
        storage: How object storage is reached.
    """

    run: str = ""
    checkpoint: str = ""
    runs: str = "runs"
    data: str = ""
    adapt_data: str = ""
    workers: int = 1
    worst: int = 6
    invalid_below: float = 0.0
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.checkpoint):
            raise ValueError(
                f"run is {self.run!r} and checkpoint is {self.checkpoint!r}: give exactly one, "
                "--run NAME_OR_URL of a trained run or --checkpoint FILE.pth of the authors"
            )
        if self.checkpoint and not self.data:
            raise ValueError("data is not set: --checkpoint needs --data URL of a data set")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}: it must be at least 1")
        if self.worst < 0:
            raise ValueError(f"worst is {self.worst}: it must not be negative")
        if not 0 <= self.invalid_below <= 1:
            raise ValueError(f"invalid_below is {self.invalid_below}: it must lie in 0..1")


@dataclass
class EvaluationTask:
    """The networks of a run or a file on one data set, as trained or after AdaBN."""

    url: str  # of the run; of the file where `checkpoint` is None
    num_classes: int
    classes: tuple[str, ...] | None  # None: a file of the authors does not name them
    precision: str
    checkpoint: Checkpoint | None
    data: str
    adapt_data: str = ""  # URL of the images for AdaBN, empty for "as trained"


@dataclass
class Output:
    """What an evaluation does with its predictions, and where in `folder` it puts them."""

    folder: str = ""  # URL
    prefix: str = "evaluation"  # of keys below it
    worst: int = 0
    invalid_below: float = 0.0
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    """Evaluate a run or a checkpoint file; returns the report and the URL it was written to.

    The report holds, per row ("student", "teacher", each also "+ AdaBN"), mIoU and the IoU of
    every class in percent (null where a class is neither there nor predicted); with the 19
    classes of Cityscapes also "miou_16" and "miou_13", over the classes of SYNTHIA; and the
    worst images. Pictures lie beside it. Of a set without labels a row holds the URL of its
    "submission". It lies in the run folder, or below `runs` for a checkpoint file.
    Raises ValueError, in one line, before any worker starts.
    """
    folder = config.runs if config.checkpoint else run_url(config.run, config.runs)
    store = open_storage(folder, config.storage)
    store.check()
    if config.checkpoint:
        url, data = absolute_url(config.checkpoint), absolute_url(config.data)
        tasks = tasks_of_file(url, data, config.adapt_data, config.storage)
        name = f"{PurePosixPath(url).stem}-{PurePosixPath(data).name}"
        report = {"checkpoint": url}
    else:
        validation = load_config(store)["validation"]["data"]
        url, data = store.url, absolute_url(config.data or validation or _missing_data())
        tasks = tasks_of_run(url, data, config.adapt_data, config.storage)
        name = PurePosixPath(data).name
        report = {"run": url, "step": tasks[0].checkpoint.step}
    # Two data sets, or two files, may share their last part's name.
    what = f"{url} {data} {config.adapt_data} {config.inference}"
    prefix = f"evaluation/{name}-{xxhash.xxh3_64_hexdigest(what.encode())[:8]}"
    output = Output(store.url, prefix, config.worst, config.invalid_below, config.inference)
    rows, taxonomy = evaluate_tasks(tasks, config.storage, config.workers, output)
    report |= {
        "data": data,
        "inference": asdict(config.inference),
        "classes": list(taxonomy.names),
        "rows": {name: row for task_rows in rows for name, row in task_rows.items()},
    }
    store.put(f"{prefix}.json", json.dumps(report, indent=1).encode())
    return report, f"{store.url}/{prefix}.json"


def tasks_of_run(
    url: str, data: str, adapt_data: str, storage: StorageConfig
) -> list[EvaluationTask]:
    """Tasks of one run: as trained and, with `adapt_data`, after AdaBN."""
    run = open_storage(url, storage)
    trained = load_config(run)
    checkpoint = newest_checkpoint(run)
    return [
        EvaluationTask(
            run.url,
            trained["model"]["num_classes"],
            tuple(trained["classes"]),
            trained["engine"]["precision"],
            checkpoint,
            data,
            adaptation,
        )
        for adaptation in _adaptations(adapt_data)
    ]


def tasks_of_file(
    url: str, data: str, adapt_data: str, storage: StorageConfig
) -> list[EvaluationTask]:
    """Tasks of a checkpoint file of the authors: as trained and, with `adapt_data`, after AdaBN."""
    num_classes = load_file_network(url, storage).num_classes
    return [
        EvaluationTask(url, num_classes, None, "fp32", None, data, adaptation)
        for adaptation in _adaptations(adapt_data)
    ]


def _adaptations(adapt_data: str) -> list[str]:
    return [""] + ([absolute_url(adapt_data)] if adapt_data else [])


def task_networks(task: EvaluationTask, storage: StorageConfig) -> Iterator[tuple[str, Segmentor]]:
    """Name and network, one after the other; a file of the authors holds a student."""
    if task.checkpoint is None:
        yield "student", load_file_network(task.url, storage)
        return
    for name in networks_of(task.checkpoint):
        yield name, load_network(task.url, storage, name, task.checkpoint)


def load_file_network(url: str, storage: StorageConfig) -> Segmentor:
    """The network in a checkpoint file of the authors, from any storage."""
    return read_official(io.BytesIO(read_url(url, storage)), url)


def networks_of(checkpoint: Checkpoint) -> list[str]:
    """Which of "student" and "teacher" a checkpoint holds."""
    names = ("student", "teacher")
    return [name for name in names if f"{name}-00000.safetensors" in checkpoint.files]


def load_network(
    url: str,
    storage: StorageConfig,
    name: str = "student",
    checkpoint: Checkpoint | None = None,
    *,
    with_projection: bool = False,
) -> Segmentor:
    """A network of a run's checkpoint (the newest) in eval mode.

    Without its projection head, unless it has one and `with_projection` asks for it.
    """
    run = open_storage(url, storage)
    weights = read_weights(run, checkpoint or newest_checkpoint(run), name)
    model = ModelConfig(**load_config(run)["model"])
    projects = any(key.startswith("projection.") for key in weights)
    network = build_blank(model, with_projection=with_projection and projects)
    if network.projection is None:
        weights = {key: v for key, v in weights.items() if not key.startswith("projection.")}
    network.load_state_dict(weights)
    return network.eval()


def evaluate_tasks(
    tasks: list[EvaluationTask], storage: StorageConfig, workers: int, output: Output
) -> tuple[list[dict[str, dict[str, Any]]], Taxonomy]:
    """Run tasks of one data set on one worker group; rows per task, and the classes."""
    manifest = open_manifest(tasks[0].data, storage)
    for url in {task.adapt_data for task in tasks if task.adapt_data}:
        if read_manifest(open_storage(url, storage)).image_size is None:
            raise ValueError(
                f"adapt_data: the images of {url} differ in size: ingest it with --size"
            )
    for task in tasks:
        _check_classes(task, manifest)
    connect_ray()
    group = WorkerRange(workers, workers)
    cpus = place(group)
    results = launch(
        "cluster.inference:evaluate_worker",
        {"tasks": tasks, "storage": storage, "cpus": cpus, "output": output},
        workers=group,
        cpus=cpus,
        storage=storage,
        folder=f"{output.folder}/evaluation/ray",
    )
    if not manifest.labelled:
        for row in (row for task_rows in results for row in task_rows.values()):
            row["submission"] = merge_parts(row.pop("parts"), output.folder, storage)
        return results, manifest.taxonomy
    rows = [
        {
            name: report_row(row.pop("counts"), manifest.taxonomy) | row
            for name, row in networks.items()
        }
        for networks in results
    ]
    return rows, manifest.taxonomy


def _check_classes(task: EvaluationTask, manifest: Manifest) -> None:
    """Raise ValueError unless the labels of the data set are the classes of the networks."""
    found = manifest.taxonomy.names
    if task.num_classes != len(found):
        raise ValueError(
            f"{task.url} was trained on {task.num_classes} classes, {manifest.url} has {len(found)}"
        )
    if manifest.labelled and task.classes not in (None, found):
        pairs = zip(task.classes, found, strict=True)
        place, (own, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"{task.url} was trained with {own!r} as class {place}, {manifest.url} has {other!r} "
            "there: ingest it with the classes of the training data"
        )


def mean_ious(matrix: ConfusionMatrix, taxonomy: Taxonomy) -> dict[str, float]:
    """Fractions: "miou" and, of 19 or 16 classes of Cityscapes, "miou_16" and "miou_13"."""
    subsets = taxonomy.reported_subsets()
    means = {f"miou_{count}": matrix.mean_iou(ids) for count, ids in subsets.items()}
    return {"miou": matrix.mean_iou(), **means}


def report_row(counts: list[list[int]], taxonomy: Taxonomy) -> dict[str, Any]:
    """What the report says of a network with these confusion counts (C, C): see `evaluate`."""
    matrix = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
    matrix.counts = torch.tensor(counts)
    return {
        **{key: _percent(mean) for key, mean in mean_ious(matrix, taxonomy).items()},
        "iou": dict(zip(taxonomy.names, map(_percent, matrix.iou().tolist()), strict=True)),
    }


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else round(100 * fraction, 2)


def _missing_data() -> str:
    raise ValueError("data is not set and the run has no validation set: give --data URL")
