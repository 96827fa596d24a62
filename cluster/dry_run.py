"""What a run would be, without running it: `python -m jobs.train --config PRESET --dry-run`.

Builds the network, the optimiser's groups, the schedule and the sampler; trains nothing, opens no
network connection, loads no weights. Data that lie in files are checked as a run would check them;
without them the sizes come from the configuration.
"""

from dataclasses import replace

import numpy as np
from torch import nn

from cluster.config import TrainConfig, ValidationConfig
from cluster.deepspeed_config import BUCKET_ELEMENTS
from cluster.manifest import Manifest, read_manifest
from cluster.sampling import Sampler
from cluster.storage import StorageConfig, open_storage
from cluster.training import resolve
from cluster.urls import absolute_url
from sepico.network import Segmentor, check_model
from sepico.optimizer import parameter_groups
from sepico.schedule import contrast_start_step, is_due, learning_rate

MIB = 1024**2
FLOAT32, FLOAT64 = 4, 8


def describe(config: TrainConfig) -> None:
    """Print sizes, memory, traffic and schedule of the run that `config` describes.

    Raises ValueError for what would stop the run.
    """
    config, unseen = _checked(config)
    source, target, validation = _local_manifests(config)
    if not config.model.num_classes and source is None:
        raise ValueError("model.num_classes is 0: give it, or data.source, for a dry run")
    classes = config.model.num_classes or source.taxonomy.num_classes
    config = replace(config, model=replace(config.model, num_classes=classes, encoder_weights=None))
    crop = config.data.crop_height, config.data.crop_width
    adapts = config.method != "source_only"
    images = filter(None, [validation, target if adapts else None])
    whole = {manifest.url: manifest.image_size for manifest in images if manifest.image_size}
    network = check_model(config.model, crop, whole=whole, with_projection=adapts)
    print(f"method            {config.method}, {classes} classes, crops {crop[1]}x{crop[0]}")
    print("parameters")
    for group in parameter_groups(network, config.optimization):
        size = sum(parameter.numel() for parameter in group["params"])
        rate = config.optimization.lr * group["multiplier"]
        print(f"  {group['name']:<22} {size:>12,}  lr {rate:g}  decay {group['weight_decay']:g}")
    total = sum(parameter.numel() for parameter in network.parameters())
    print(f"  {'in all':<22} {total:>12,}")
    _print_memory(config, total, adapts)
    _print_traffic(config, network)
    _print_schedule(config)
    _print_data(config, source, target)
    if unseen:
        what = "sizes, classes, labels" + (", references" if config.teacher.day_night else "")
        print(f"not checked       {what}: {' and '.join(unseen)} not in files here")


def model_state_bytes(parameters: int, stage: int, workers: int, *, teacher: bool) -> int:
    """Bytes of model states of one worker at the end of the backwards, their peak.

    Float32: parameters 4, gradients 4, AdamW's moments 8 and, where ZeRO shards, its own flat
    copy of the parameters 4; the teacher 4. ZeRO 1 and 2 shard what the optimiser holds, 3 the
    parameters and the teacher too. Gradients are whole at any stage, because one reduction serves
    all loss terms; 3 has the reduced shard besides, and where ZeRO shards there is a bucket.
    Activations, and the parameters that stage 3 gathers for them, come on top. Once they are gone,
    stage 0 holds the gradients a second time while it reduces them.
    """
    optimizer = 12 / workers if stage else 8
    gradients = 4 + (4 / workers if stage == 3 else 0)
    weights = 4 / workers if stage == 3 else 4
    average = weights if teacher else 0
    bucket = FLOAT32 * BUCKET_ELEMENTS if stage else 0
    return round(parameters * (optimizer + gradients + weights + average)) + bucket


def _print_memory(config: TrainConfig, total: int, adapts: bool) -> None:
    workers = config.worker_range.min
    print(f"model states      per worker of {workers}, ZeRO stage: MiB")
    chosen = config.engine.for_workers(workers).zero_stage
    mark = "  <- engine.zero_stage"
    if chosen != config.engine.zero_stage:
        mark += f" {config.engine.zero_stage}, of one worker alone"
    for stage in (0, 1, 2, 3):
        size = model_state_bytes(total, stage, workers, teacher=adapts) / MIB
        print(f"  {stage}: {size:,.0f}{mark if stage == chosen else ''}")


def all_reduced_bytes(config: TrainConfig, network: Segmentor) -> dict[str, int]:
    """Bytes that a worker of several hands to all-reduces in one step with contrast, by purpose."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sizes = {"gradients": parameters * FLOAT32}
    if config.method != "source_only":
        stages, width = len(config.contrast_stage_weights), config.model.projection_channels
        counts = stages * (config.model.num_classes * (2 * width + 1) + 1) + 1
        sizes["statistics"] = counts * FLOAT64
        if config.contrast.regularizer_weight:
            # The mean feature of two domains, forward and backward.
            sizes["regularizer"] = 4 * stages * width * FLOAT32
    if config.engine.batch_norm == "sync":
        sizes["batch-norm"] = _batch_norm_bytes(config, network)
    return sizes


def _batch_norm_bytes(config: TrainConfig, network: Segmentor) -> int:
    """Forward 2 C + 1 numbers a layer of C channels, backward 2 C, in every pass of the step.

    At most: without a projection of the last stage the target's backward skips later layers.
    """
    masked, labels = bool(config.mic.weight), 4 if config.teacher.day_night else 2
    # Passes of student and teacher: source, target, mix, masked; pseudo-labels, source features.
    passes = {
        "encoder": (3 + masked, labels + 1),
        "head": (2 + masked, labels),
        "projection": (2, 1),
    }
    if config.method == "source_only":
        passes = {"encoder": (1, 0), "head": (1, 0)}
    numbers = 0
    for part, (student, teacher) in passes.items():
        for layer in getattr(network, part).modules():
            if isinstance(layer, nn.BatchNorm2d):
                forward, backward = 2 * layer.num_features + 1, 2 * layer.num_features
                numbers += student * (forward + backward) + teacher * forward
    return numbers * FLOAT64


def _print_traffic(config: TrainConfig, network: Segmentor) -> None:
    print("all-reduced       bytes per step and worker, where there are several")
    for name, size in all_reduced_bytes(config, network).items():
        print(f"  {name:<11}{size:>14,}{'  whatever the batch' if name == 'statistics' else ''}")


def _print_schedule(config: TrainConfig) -> None:
    optimization = config.optimization
    start = contrast_start_step(config.contrast.start, optimization)
    print(
        f"steps             {optimization.steps:,} of {optimization.global_batch} images a domain"
    )
    print(f"  contrast from   {start:,}")
    intervals = {"checkpoints": config.checkpoint_every}
    if config.validation.data:
        intervals["validations"] = config.validation.every
    for name, every in intervals.items():
        dues = [is_due(done, every, optimization) for done in range(1, optimization.steps)]
        print(f"  {name:<16}{sum(dues) + 1:,}")
    for step in sorted({0, round(optimization.warmup / optimization.batch_ratio)}):
        print(f"  rate at {step:<8,}{learning_rate(step, optimization):.3g}")


def _print_data(config: TrainConfig, source: Manifest | None, target: Manifest | None) -> None:
    data, batch = config.data, config.optimization.global_batch
    for name, manifest in (("source", source), ("target", target)):
        size = len(manifest) if manifest else getattr(data, f"{name}_images")
        origin = manifest.url if manifest else f"no manifest: data.{name}_images"
        epoch = f"{size / batch:,.0f} steps an epoch" if size else "unknown size"
        print(f"{name:<18}{size:,} images, {epoch} ({origin})")
    sampler = Sampler(
        # Without a manifest, images that hold every class alike.
        source.pixel_counts
        if source
        else np.full((1, config.model.num_classes), data.rcs_min_pixels + 1),
        len(target) if target else max(data.target_images, 1),
        seed=config.seed,
        global_batch=batch,
        temperature=data.rcs_temperature,
        min_pixels=data.rcs_min_pixels,
    )
    print(f"first draw        {sampler.draw(0, 0)}")


def _checked(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration after a run's own checks of data in files, and the keys of other data."""
    urls = {
        "data.source": config.data.source,
        "data.target": config.data.target,
        "validation.data": config.validation.data,
    }
    unseen = [key for key, url in urls.items() if not _in_files(url)]
    if not config.validation.data:
        unseen.remove("validation.data")
    if "data.source" in unseen or "data.target" in unseen:
        return config, unseen
    validation = ValidationConfig() if unseen else config.validation
    return resolve(replace(config, validation=validation)), unseen


def _in_files(url: str) -> bool:
    return bool(url) and absolute_url(url).startswith("file://")


def _local_manifests(config: TrainConfig) -> tuple[Manifest | None, ...]:
    """Manifests of source, target and validation data in files; object stores are not asked."""
    return tuple(
        read_manifest(open_storage(absolute_url(url), StorageConfig())) if _in_files(url) else None
        for url in (config.data.source, config.data.target, config.validation.data)
    )
