"""From a configuration to a trained run: checks first, then workers."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoint_format import check_newest, complete_manifests, delete_incomplete
from cluster.config import TrainConfig
from cluster.data import check_data, check_set
from cluster.deepspeed_config import read_deepspeed
from cluster.errors import WorkError
from cluster.events import log_event
from cluster.lease import Lease, hold_lease
from cluster.manifest import open_manifest, read_manifest
from cluster.progress import ProgressDisplay, start_progress
from cluster.run_config import CONFIG, check_continuation, check_fork, described
from cluster.storage import open_storage
from cluster.urls import absolute_url, run_url
from cluster.workers import connect_ray, launch, place, use_gpu


@dataclass(frozen=True)
class Ended:
    """What a worker returns of a run that another start would not help: why it ends."""

    reason: str


@dataclass(frozen=True)
class Pauses:
    """Steps after which a run waits, with its workers, until its ProgressActor lets it go on."""

    steps: tuple[int, ...]
    progress: Any


def train(
    config: TrainConfig, until: int | None = None, pauses: Pauses | None = None
) -> dict[str, Any]:
    """Create or continue a run; returns the last validation's metrics and the run's URL.

    Ends after `until` steps where the run is longer, with a validation and a checkpoint as at the
    end; called again it goes on from there, and keeps this checkpoint: other runs may fork from it.
    A pause has a validation and a checkpoint too.

    Raises ValueError (one line: what is wrong and the fix) before any worker starts; LeaseError,
    one of these, where another writer holds the run.
    """
    config = resolve(config)
    until = min(until or config.optimization.steps, config.optimization.steps)
    run = open_storage(config.run, config.storage)
    run.check()
    wanted = described(config)
    check_continuation(run, wanted)
    if config.fork and not complete_manifests(run):
        check_fork(config, wanted)
    if pauses is None:  # a search has checked its networks before its first trial
        check_network(config)
    connect_ray()
    cpus = place(
        config.worker_range,
        config.cpus_per_worker,
        config.placement_timeout,
        global_batch=config.optimization.global_batch,
    )
    if config.engine.precision == "fp16" and not use_gpu():
        raise ValueError("engine.precision fp16 needs GPUs: take bf16 or fp32")
    with hold_lease(run) as lease:
        check_continuation(run, wanted)  # once more: another writer may have begun the run since
        newest = check_newest(run, fall_back=config.fall_back)
        if newest is not None and newest.step >= until:
            delete_incomplete(run)
            return {**newest.metrics, "run": config.run}
        run.put(CONFIG, json.dumps(wanted, indent=1).encode())
        metrics = _train(replace(config, cpus_per_worker=cpus), lease, until, pauses)
    if isinstance(metrics, Ended):
        raise WorkError(f"run {config.run}: {metrics.reason}")
    log_event("info", "finished", {"run": config.run, **metrics})
    return {**metrics, "run": config.run}


def check_network(config: TrainConfig) -> None:
    """Raise what building the network, and running it on its images, would: ValueError in one line.

    Of data whose images differ in size none but the crops are looked at.
    """
    from sepico.network import check_model  # with torch: seconds and 300 MB for a trial's driver

    # The teacher labels whole images.
    urls = [config.validation.data, config.data.target if config.method != "source_only" else ""]
    manifests = [read_manifest(open_storage(url, config.storage)) for url in urls if url]
    crop = config.data.crop_height, config.data.crop_width
    check_model(config.model, crop, whole={m.url: m.image_size for m in manifests if m.image_size})


def _train(
    config: TrainConfig, lease: Lease, until: int, pauses: Pauses | None
) -> dict[str, float] | Ended:
    """Run the group of workers up to step `until` and show its progress."""
    progress = pauses.progress if pauses else start_progress(config.run)
    if pauses is None:  # the trials of a search may have to wait for each other
        progress.expect_steps.remote()
    payload = {
        "config": config,
        "run_url": config.run,
        "until": until,
        "pauses": pauses.steps if pauses else (),
        "lease": lease,
        "progress": progress,
    }
    fields = {"run": config.run, "method": config.method, "steps": config.optimization.steps}
    log_event("info", "started", fields)
    with ProgressDisplay(progress, config.method, "step"):
        return launch(
            "cluster.worker:train_worker",
            payload,
            workers=config.worker_range,
            cpus=config.cpus_per_worker,
            storage=config.storage,
            folder=config.run,
            global_batch=config.optimization.global_batch,
            max_failures=config.max_failures,
            progress=progress,
        )


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what the data decides, make places absolute, and check all against the data."""
    check_set(config.data)
    cache = config.data.cache
    data = replace(
        config.data,
        source=absolute_url(config.data.source),
        target=absolute_url(config.data.target),
        # Ray's workers run in a folder of their own.
        cache=cache and str(Path(cache).expanduser().absolute()),
    )
    validation = config.validation
    if validation.data:
        validation = replace(validation, data=absolute_url(validation.data))
    name = config.run or f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    fork = config.fork and absolute_url(config.fork)
    run = run_url(name, config.runs)
    config = replace(config, data=data, validation=validation, run=run, fork=fork)
    manifest = check_data(
        data,
        config.storage,
        config.optimization.global_batch,
        day_night=config.teacher.day_night and config.method != "source_only",
    )
    if validation.data:
        checked = open_manifest(validation.data, config.storage)
        if checked.labelled and checked.taxonomy != manifest.taxonomy:
            raise ValueError(
                f"validation.data {validation.data} must be labelled with the classes of "
                f"data.source {data.source}, or not at all"
            )
    found = manifest.taxonomy.num_classes
    if config.model.num_classes not in (0, found):
        raise ValueError(
            f"model.num_classes is {config.model.num_classes} but {data.source} has {found} "
            "classes: set it to 0 to take the data's"
        )
    weights = config.model.encoder_weights
    if weights not in (None, "imagenet"):
        weights = str(Path(weights).absolute())
    model = replace(config.model, num_classes=found, encoder_weights=weights)
    engine = replace(config.engine, deepspeed=read_deepspeed(config.engine.deepspeed))
    return replace(config, model=model, engine=engine)
