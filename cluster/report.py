"""One self-contained HTML file about finished runs: `python -m jobs.report --run RUN [--run ...]`.

It is made from what the runs left (configuration, metrics, evaluations) and, for the pictures, by
their students' networks, here and without Ray. The first run is the "before" of the gallery.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cluster import report_html, report_pictures
from cluster.checkpoint_format import newest_checkpoint
from cluster.environment import ENVIRONMENT
from cluster.evaluation import load_network
from cluster.reader import ShardReader, open_reader
from cluster.run_config import METRICS, load_config
from cluster.storage import Storage, StorageConfig, open_storage
from cluster.urls import absolute_url, folder_and_key, run_url
from sepico.embedding import draw_pixels, flatten_features, pixel_features
from sepico.network import Segmentor
from sepico.panels import error_map, image_grid
from sepico.prediction import InferenceConfig, Predictor
from sepico.taxonomies import Taxonomy

PIXELS_PER_CLASS = 40  # of each domain, in the embedding map
EMBEDDED_IMAGES = 12  # of each domain


@dataclass
class ReportConfig:
    """A report on runs: what they were, curves, IoU per class, predictions, features.

    Attributes:
        run: Name (a folder below `runs`) or URL of a run; give it again for more, the baseline
            first.
        to: Where the HTML file goes: a path or URL.
        runs: URL of the folder that holds runs given by name.
        data: URL of labelled images of the target domain; default: the runs' validation set.
        images: Images in the gallery.
        embedding: How the features of pixels are laid out in the plane; "none" leaves them out.
        storage: How object storage is reached.
    """

    run: list[str] = field(default_factory=list)
    to: str = "report.html"
    runs: str = "runs"
    data: str = ""
    images: int = 6
    embedding: Literal["tsne", "pca", "none"] = "tsne"
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is not set: give --run NAME_OR_URL, again for more runs")
        if self.images < 0:
            raise ValueError(f"images is {self.images}: it must not be negative")


@dataclass
class ReportedRun:
    """What a run left; read when it is asked for."""

    store: Storage
    storage: StorageConfig

    @property
    def name(self) -> str:
        return PurePosixPath(self.store.url).name

    @cached_property
    def config(self) -> dict[str, Any]:
        return load_config(self.store)

    @cached_property
    def environment(self) -> dict[str, Any]:
        known = self.store.exists(ENVIRONMENT)
        return json.loads(self.store.get(ENVIRONMENT)) if known else {}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        if not self.store.exists(METRICS):
            return []
        return [json.loads(line) for line in self.store.get(METRICS).decode().splitlines()]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """What `jobs.evaluate` wrote of labelled sets."""
        keys = [key for key in self.store.list("evaluation") if key.endswith(".json")]
        found = [json.loads(self.store.get(key)) for key in keys if key.count("/") == 1]
        return [report for report in found if all("iou" in row for row in report["rows"].values())]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps done and values of a metric."""
        return [(int(line["step"]) + 1, line[name]) for line in self.metrics if name in line]

    def rows(self, data: str) -> dict[str, dict[str, Any]]:
        """The rows of its newest evaluation on a data set, else of its last validation."""
        for report in sorted(self.evaluations, key=lambda report: -report.get("step", 0)):
            plain = asdict(InferenceConfig()) | {"scales": [1.0]}
            if report["data"] == data and report.get("inference", plain) == plain:
                return report["rows"]
        if data != self.config["validation"]["data"]:
            return {}
        return {name: row for name in ("student", "teacher") if (row := self._validated(name))}

    def _validated(self, name: str) -> dict[str, Any] | None:
        line = next((line for line in reversed(self.metrics) if f"{name}_miou" in line), None)
        if line is None:
            return None
        prefix = f"{name}_iou/"
        ious = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        return {"miou": line[f"{name}_miou"], "iou": ious}

    @property
    def worker_hours(self) -> float:
        """Time of all workers together in the steps that are part of the result."""
        seconds, before = 0.0, 0
        for line in self.metrics:
            if "images_per_second" in line:
                steps, before = line["step"] + 1 - before, line["step"] + 1
                images = steps * self.config["optimization"]["global_batch"]
                seconds += images / line["images_per_second"] * line["workers"]
        return seconds / 3600

    def network(self, *, with_projection: bool = False) -> Segmentor:
        return load_network(self.store.url, self.storage, with_projection=with_projection)


def open_runs(config: ReportConfig) -> list[ReportedRun]:
    """The runs, each with a checkpoint, of one set of classes. Raises ValueError in one line."""
    runs, classes = [], set()
    for run in config.run:
        store = open_storage(run_url(run, config.runs), config.storage)
        store.check()
        runs.append(ReportedRun(store, config.storage))
        classes.add(tuple(runs[-1].config["classes"]))
        newest_checkpoint(store)
    if len(classes) > 1:
        raise ValueError("the runs' classes, or their order, differ: report on them one by one")
    return runs


def check(config: ReportConfig) -> None:
    """Everything that can be known before work starts. Raises ValueError in one line."""
    runs = open_runs(config)
    _target(config, runs)
    open_storage(folder_and_key(config.to)[0], config.storage).check()


def report(config: ReportConfig) -> str:
    """Write the report; returns its URL."""
    runs = open_runs(config)
    target = _target(config, runs)
    taxonomy = target.manifest.taxonomy
    sections = [
        report_html.summary(runs, target.manifest.url),
        report_html.figure(
            "IoU per class on the target",
            report_pictures.iou_bars(
                {run.name: run.rows(target.manifest.url) for run in runs}, taxonomy.names
            ),
            f"Percent, on {target.manifest.url}. Rows with AdaBN have their batch-norm statistics "
            "re-estimated on the target; jobs.evaluate adds them.",
        ),
        report_html.figure("Curves", report_pictures.curves(runs), "By steps of the optimiser."),
    ]
    if config.images:
        picture = _gallery(runs, target, config.images)
        said = "Errors are red, right pixels grey, pixels without a label black."
        sections.append(report_html.figure("Images of the target", picture, said))
    if config.embedding != "none":
        sections.append(_embedding_section(config, runs, target))
    sections += [report_html.details(run) for run in runs]
    page = report_html.page("SePiCo: " + ", ".join(run.name for run in runs), sections)
    folder, key = folder_and_key(config.to)
    store = open_storage(folder, config.storage)
    store.put(key, page.encode())
    return f"{store.url}/{key}"


def _target(config: ReportConfig, runs: list[ReportedRun]) -> ShardReader:
    url = config.data or next(
        (url for run in runs if (url := run.config["validation"]["data"])), ""
    )
    if not url:
        raise ValueError("data is not set and no run has a validation set: give --data URL")
    reader = open_reader(absolute_url(url), config.storage)
    manifest, classes = reader.manifest, runs[0].config["classes"]
    if not manifest.labelled or list(manifest.taxonomy.names) != classes:
        raise ValueError(
            f"{manifest.url} must be labelled with the runs' classes: {', '.join(classes)}"
        )
    return reader


def _spread(reader: ShardReader, count: int) -> Iterator[Any]:
    """Up to `count` samples, evenly over the data set."""
    total = len(reader.manifest)
    for index in np.linspace(0, total - 1, min(count, total)).round().astype(int):
        yield reader.read(int(index))


def _gallery(runs: list[ReportedRun], target: ShardReader, count: int) -> bytes:
    """A row an image: image, truth, each run's prediction and its errors."""
    taxonomy = target.manifest.taxonomy
    predictors = {run.name: Predictor(run.network(), taxonomy) for run in runs}
    grid = []
    for sample in _spread(target, count):
        truth = sample.label.numpy()
        row = [("target", sample.image.permute(1, 2, 0).numpy()), ("truth", taxonomy.paint(truth))]
        for name, predictor in predictors.items():
            (found,) = predictor.predict_batch(sample.image[None])
            row.append((name, found.colored()))
            row.append((f"{name}: errors", error_map(found.labels, truth, taxonomy.ignore_index)))
        grid.append(row)
    return image_grid(grid, taxonomy)


def _embedding_section(config: ReportConfig, runs: list[ReportedRun], target: ShardReader) -> str:
    source = open_reader(runs[-1].config["data"]["source"], config.storage)
    maps = {
        run.name: _embedding(run.network(with_projection=True), source, target, config.embedding)
        for run in runs
    }
    picture = report_pictures.embedding_maps(maps, target.manifest.taxonomy)
    kind = {"tsne": "t-SNE", "pca": "principal components"}[config.embedding]
    said = (
        f"Features of pixels of both domains ({kind}), coloured by their true class: the output of "
        "the projection head; of a run without one, the input of its classifier."
    )
    return report_html.figure("Embedding map", picture, said)


def _embedding(
    network: Segmentor, source: ShardReader, target: ShardReader, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Places (N, 2), classes (N,), and whether a pixel is the target's (N,)."""
    features, classes, of_target = [], [], []
    for domain, reader in enumerate((source, target)):
        taxonomy: Taxonomy = reader.manifest.taxonomy
        found = []
        for sample in _spread(reader, EMBEDDED_IMAGES):
            label = sample.label.long()
            label = label.masked_fill(label == taxonomy.ignore_index, 255)[None, None]
            found.append(pixel_features(network, sample.image[None].float() / 255, label))
        rows, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        drawn = draw_pixels(labels, PIXELS_PER_CLASS, seed=domain)
        features.append(rows[drawn])
        classes.append(labels[drawn])
        of_target.append(torch.full((len(drawn),), bool(domain)))
    return flatten_features(torch.cat(features), method), torch.cat(classes), torch.cat(of_target)
