"""What a run would be, without running it: `python -m jobs.train --config PRESET --dry-run`.

Builds the network, the optimiser's groups, the schedule and the sampler; trains nothing, opens no
network connection, loads no weights.
"""

from dataclasses import replace

import numpy as np

from cluster.config import TrainConfig
from cluster.engine import parameter_groups
from cluster.manifest import Manifest, read_manifest
from cluster.sampling import Sampler
from cluster.storage import StorageConfig, absolute_url, open_storage
from sepico.network import build_segmentor, check_model
from sepico.schedule import contrast_start_step, learning_rate

MIB = 1024**2
FLOAT32, FLOAT64 = 4, 8


def describe(config: TrainConfig) -> None:
    """Print sizes, memory, traffic and schedule of the run that `config` describes.

    Raises ValueError for what would stop the run.
    """
    source, target = _local_manifests(config)
    if not config.model.num_classes and source is None:
        raise ValueError("model.num_classes is 0: give it, or data.source, for a dry run")
    classes = config.model.num_classes or source.taxonomy.num_classes
    config = replace(config, model=replace(config.model, num_classes=classes, encoder_weights=None))
    crop = config.data.crop_height, config.data.crop_width
    check_model(config.model, crop)
    adapts = config.method != "source_only"
    network = build_segmentor(config.model, with_projection=adapts)
    print(f"method            {config.method}, {classes} classes, crops {crop[1]}x{crop[0]}")
    print("parameters")
    for group in parameter_groups(network, config.optimization):
        size = sum(parameter.numel() for parameter in group["params"])
        rate = config.optimization.lr * group["multiplier"]
        print(f"  {group['name']:<22} {size:>12,}  lr {rate:g}  decay {group['weight_decay']:g}")
    total = sum(parameter.numel() for parameter in network.parameters())
    print(f"  {'in all':<22} {total:>12,}")
    _print_memory(config, total, adapts)
    _print_traffic(config, total, adapts)
    _print_schedule(config)
    _print_data(config, source, target)


def model_state_bytes(parameters: int, stage: int, workers: int, *, teacher: bool) -> int:
    """Bytes of model states of one worker, activations apart.

    Float32: parameters 4, gradients 4, AdamW's moments 8 and, where ZeRO shards, its own flat
    copy of the parameters 4; the teacher 4, replicated. ZeRO 1 shards what the optimiser holds, 2
    the gradients too, 3 the parameters too.
    """
    optimizer = 8 if stage == 0 else 12 / workers
    gradients = 4 / workers if stage >= 2 else 4
    weights = 4 / workers if stage == 3 else 4
    return round(parameters * (optimizer + gradients + weights + (4 if teacher else 0)))


def _print_memory(config: TrainConfig, total: int, adapts: bool) -> None:
    print(f"model states      per worker of {config.workers}, ZeRO stage: MiB")
    chosen = config.engine.zero_stage
    for stage in (0, 1, 2, 3):
        size = model_state_bytes(total, stage, config.workers, teacher=adapts) / MIB
        print(f"  {stage}: {size:,.0f}{'  <- engine.zero_stage' if stage == chosen else ''}")


def _print_traffic(config: TrainConfig, total: int, adapts: bool) -> None:
    print("all-reduced       bytes per step")
    print(f"  gradients  {total * FLOAT32:>14,}")
    if adapts:
        stages = len(config.contrast_stage_weights)
        width = 2 * config.model.projection_channels + 1
        size = FLOAT64 * (stages * (config.model.num_classes * width + 1) + 1)
        print(f"  statistics {size:>14,}  whatever the batch")


def _print_schedule(config: TrainConfig) -> None:
    optimization = config.optimization
    start = contrast_start_step(config.contrast.start, optimization)
    print(
        f"steps             {optimization.steps:,} of {optimization.global_batch} images a domain"
    )
    print(f"  contrast from   {start:,}")
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


def _local_manifests(config: TrainConfig) -> tuple[Manifest | None, Manifest | None]:
    """Manifests of data sets that lie in files; object stores are not asked."""
    urls = [absolute_url(url) if url else "" for url in (config.data.source, config.data.target)]
    return tuple(
        read_manifest(open_storage(url, StorageConfig())) if url.startswith("file://") else None
        for url in urls
    )
