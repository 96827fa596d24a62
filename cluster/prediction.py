"""Predict a folder or bucket of images: `python -m jobs.predict`.

Ray Data hands the images out to a pool of actors, each with the network in memory. An image whose
files are there already is skipped, so a job that was interrupted goes on. An image that cannot be
read is reported and the others are predicted; a store that cannot be written to ends the job.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import ray
from ray.data import ActorPoolStrategy, DataContext

from cluster.checkpoint_format import newest_checkpoint
from cluster.evaluation import load_file_network, load_network, networks_of
from cluster.events import log_event
from cluster.predictor import FOLDERS, PredictImages, output_keys
from cluster.ray_tasks import progress_bar
from cluster.run_config import load_config, trained_taxonomy
from cluster.storage import StorageConfig, StorageError, open_storage
from cluster.urls import absolute_url, run_url
from cluster.workers import connect_ray, use_gpu
from sepico import exported
from sepico.network import Segmentor
from sepico.prediction import InferenceConfig, taxonomy_of_size
from sepico.taxonomies import CITYSCAPES_LABEL_IDS, Taxonomy

SUFFIXES = (".jpg", ".jpeg", ".png")
DESCRIPTION = "predictions.json"
MAX_BLOCKS = 10_000


@dataclass
class PredictConfig:
    """Labels, colours and confidences of all images below a folder or URL.

    For every image KEY.jpg or KEY.png it writes labels/KEY.png (8-bit), overlays/KEY.jpg (the
    classes' colours over the image) and confidence/KEY.png (8-bit, 255 is certain), in the size of
    the image. Started again, it goes on with the images that are not done.

    Attributes:
        images: Folder or URL of JPEG and 8-bit PNG images, of any sizes, in sub-folders too.
        to: Where the predictions go: a folder or URL, not below `images`.
        run: Name (a folder below `runs`) or URL of a run, whose newest checkpoint predicts.
        exported: Folder or URL that `jobs.export` wrote, in place of a run.
        checkpoint: Path or URL of one of the authors' .pth files, in place of a run.
        runs: URL of the folder that holds runs given by name.
        network: Which network of a run predicts.
        ids: Values in the label files: "train" ids 0..C-1, or the "label" ids of Cityscapes.
        overlays: Write the overlays.
        confidence: Write the confidence maps.
        workers: Actors that predict, with one GPU each where the cluster has GPUs, else one CPU
            core; 0 for as many as the cluster has room for.
        batch: Images that an actor takes at once; those of one size pass the network together.
        inference: How an image is predicted.
        storage: How object storage is reached.
    """

    images: str
    to: str
    run: str = ""
    exported: str = ""
    checkpoint: str = ""
    runs: str = "runs"
    network: Literal["student", "teacher"] = "student"
    ids: Literal["train", "label"] = "train"
    overlays: bool = True
    confidence: bool = True
    workers: int = 0
    batch: int = 8
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        given = [name for name in ("run", "exported", "checkpoint") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no network'} given: give exactly one of --run "
                "NAME_OR_URL, --exported FOLDER and --checkpoint FILE.pth"
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: it must not be negative")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: it must be at least 1")
        images, to = absolute_url(self.images).rstrip("/"), absolute_url(self.to).rstrip("/")
        if f"{to}/".startswith(f"{images}/"):
            raise ValueError(f"to {self.to} lies below images {self.images}: give another place")

    @property
    def folders(self) -> list[str]:
        """The kinds of files that every image gets."""
        wanted = {"overlays": self.overlays, "confidence": self.confidence}
        return [name for name in FOLDERS if wanted.get(name, True)]


@dataclass(frozen=True)
class Plan:
    """What there is to do."""

    taxonomy: Taxonomy
    description: dict[str, Any]  # of the network and how it predicts
    keys: list[str]  # of the images that are to be predicted
    done: int  # images whose files are there already


def check(config: PredictConfig) -> None:
    """Everything that can be known before work starts. Raises ValueError in one line."""
    make_plan(config)


def make_plan(config: PredictConfig) -> Plan:
    """Look at the network, the images and what is there already; raises ValueError."""
    images, to = (open_storage(url, config.storage) for url in (config.images, config.to))
    images.check()
    to.check()
    found = [key for key in images.list() if key.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) below {images.url}: correct --images")
    stems: dict[str, str] = {}
    for key in found:
        first = stems.setdefault(str(PurePosixPath(key).with_suffix("")), key)
        if first != key:
            raise ValueError(f"{first} and {key} of {images.url} have one stem: rename one")
    origin, taxonomy = describe_network(config)
    if config.ids == "label" and set(taxonomy.names) - set(CITYSCAPES_LABEL_IDS):
        raise ValueError("ids label is for the classes of Cityscapes: take --ids train")
    description = {
        "origin": origin,
        "ids": config.ids,
        "inference": json.loads(json.dumps(asdict(config.inference))),
    }
    there = set(to.list())
    if DESCRIPTION in there:
        before = json.loads(to.get(DESCRIPTION))
        for name, value in description.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{to.url} holds predictions with {name} {before.get(name)}, now it is "
                    f"{value}: give another --to"
                )
    todo = [key for key in found if not there.issuperset(output_keys(key, config.folders))]
    return Plan(taxonomy, description, todo, len(found) - len(todo))


def describe_network(config: PredictConfig) -> tuple[dict[str, Any], Taxonomy]:
    """Where the network is from, and its classes. Raises ValueError if it is not there."""
    storage = config.storage
    if config.checkpoint:
        url = absolute_url(config.checkpoint)
        return {"checkpoint": url}, taxonomy_of_size(
            load_file_network(url, storage).num_classes, url
        )
    if config.exported:
        description = read_exported(config.exported, storage)
        return description["origin"], Taxonomy.from_dict(description["taxonomy"])
    run = open_storage(run_url(config.run, config.runs), storage)
    run.check()
    trained = load_config(run)
    checkpoint = newest_checkpoint(run)
    if config.network not in networks_of(checkpoint):
        raise StorageError(f"run {run.url} has no {config.network}: predict with its student")
    origin = {"run": run.url, "step": checkpoint.step, "network": config.network}
    return origin, trained_taxonomy(trained, storage)


def read_exported(url: str, storage: StorageConfig) -> dict[str, Any]:
    """The description in a folder or URL that `jobs.export` wrote."""
    store = open_storage(url, storage)
    store.check(exported.DESCRIPTION)
    if not store.exists(exported.DESCRIPTION):
        raise StorageError(f"no exported network at {store.url}: write it with jobs.export")
    return json.loads(store.get(exported.DESCRIPTION))


def load_prediction_network(config: PredictConfig) -> Segmentor:
    """The network that predicts, in eval mode on the CPU."""
    if config.checkpoint:
        return load_file_network(absolute_url(config.checkpoint), config.storage)
    if config.exported:
        store = open_storage(config.exported, config.storage)
        description = read_exported(config.exported, config.storage)
        name = f"{store.url}/{exported.WEIGHTS}"
        return exported.build(description, store.get(exported.WEIGHTS), name)
    return load_network(run_url(config.run, config.runs), config.storage, config.network)


def predict(config: PredictConfig) -> dict[str, Any]:
    """Predict what is not done; returns the numbers "predicted" and "done", and what "failed".

    Raises ValueError, in one line, for a mistake, and where no image could be predicted.
    """
    plan = make_plan(config)
    to = open_storage(config.to, config.storage)
    to.put(DESCRIPTION, json.dumps(plan.description, indent=1).encode())
    failed: dict[str, str] = {}
    if plan.keys:
        connect_ray()
        with progress_bar("predict", len(plan.keys)) as progress:
            for row in _rows(config, plan):
                progress.update()
                if row["error"]:
                    failed[row["key"]] = row["error"]
                    log_event("warning", "failed", {"message": row["error"], "key": row["key"]})
        to.put(DESCRIPTION, json.dumps({**plan.description, "failed": failed}, indent=1).encode())
    if plan.keys and len(failed) == len(plan.keys) and not plan.done:
        raise ValueError(f"none of {len(failed)} images: {next(iter(failed.values()))}")
    result = {"predicted": len(plan.keys) - len(failed), "done": plan.done, "failed": failed}
    log_event("info", "finished", {"to": to.url, **result})
    return result


def _rows(config: PredictConfig, plan: Plan) -> Iterator[dict[str, Any]]:
    """Key and error (empty: none) of every image, as they are done."""
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    gpu = use_gpu()
    room = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
    blocks = math.ceil(len(plan.keys) / config.batch)
    workers = min(config.workers or room, blocks)
    if workers > room:
        kind = "GPUs" if gpu else "CPU cores"
        raise ValueError(f"workers: {workers} asked for, the cluster has {room} {kind}: lower it")
    # Read and verified once, here; actors get it from the object store.
    network = ray.put(load_prediction_network(config))
    images = ray.data.from_items(
        [{"key": key} for key in plan.keys], override_num_blocks=min(blocks, MAX_BLOCKS)
    )
    predicted = images.map_batches(
        PredictImages,
        fn_constructor_args=(config, plan.taxonomy, network),
        batch_size=config.batch,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=0 if gpu else 1,
        num_gpus=1 if gpu else 0,
    )
    try:
        yield from predicted.iter_rows()
    except ray.exceptions.RayError as error:
        cause = error
        while cause is not None and not isinstance(cause, ValueError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise ValueError(str(cause)) from error
