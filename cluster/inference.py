"""Distributed evaluation: each worker predicts its share, the confusion matrix is all-reduced."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.engine import autocast_dtype, set_up_process
from cluster.evaluation import EvaluationTask, task_networks
from cluster.loader import load_samples
from cluster.reader import open_reader
from cluster.storage import StorageConfig
from sepico.metrics import Certainty, ConfusionMatrix
from sepico.network import Segmentor
from sepico.normalization import set_batch_norm


@torch.no_grad()
def evaluate_network(
    network: Segmentor, data_url: str, storage: StorageConfig, device: torch.device
) -> tuple[ConfusionMatrix | None, Certainty]:
    """Confusion matrix (None without labels) and certainty of a network on a data set, in eval
    mode. A collective.

    Every rank makes equally many forwards, the last ones without counting them, because sharded
    parameters are gathered by all ranks together.
    """
    reader = open_reader(data_url, storage)
    manifest = reader.manifest
    taxonomy = manifest.taxonomy
    matrix, certainty = None, Certainty(network.num_classes)
    if manifest.labelled:
        matrix = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
    training = network.training
    network.eval()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rounds = math.ceil(len(manifest) / world_size)
    # Samples that follow each other lie side by side: one request reads many.
    mine = range(rank * rounds, min((rank + 1) * rounds, len(manifest)))
    indices = [mine[turn] if turn < len(mine) else 0 for turn in range(rounds)]
    for turn, sample in enumerate(load_samples(reader, indices)):
        image = sample.image[None].to(device).float() / 255
        logits, _ = network(network.normalize(image), projections=False)
        if turn >= len(mine):
            continue
        certainty.update(logits.float().softmax(1))
        if matrix is not None:
            logits = nn.functional.interpolate(
                logits, sample.label.shape, mode="bilinear", align_corners=False
            )
            matrix.update(logits[0].argmax(0), sample.label.to(device))
    network.train(training)
    for sums in filter(None, (matrix, certainty)):
        sums.all_reduce(device)
    return matrix, certainty


@torch.no_grad()
def adapt_batch_norm(
    network: Segmentor,
    data_url: str,
    storage: StorageConfig,
    device: torch.device,
    batch: int = 8,
) -> None:
    """AdaBN: replace running statistics by the average over an (unlabelled) data set, in place.

    Batches of about `batch` images (a multiple of the number of workers) over all workers;
    images beyond the last whole batch are left out. A collective.

    Li et al., Adaptive batch normalization for practical domain adaptation (2018).
    """
    reader = open_reader(data_url, storage)
    manifest = reader.manifest
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch = max(min(batch, len(manifest)) // world_size, 1) * world_size
    if len(manifest) < world_size:
        raise ValueError(f"{data_url} has fewer images than there are workers ({world_size})")
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    used = len(manifest) - len(manifest) % batch
    samples = load_samples(reader, range(rank, used, world_size))
    for _ in range(used // batch):
        images = torch.stack([next(samples).image for _ in range(batch // world_size)])
        network(network.normalize(images.to(device).float() / 255), projections=False)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def evaluate_worker(payload: dict[str, Any]) -> list[dict[str, list[list[int]]]]:
    """Evaluate every task in `tasks` on a Ray Train group.

    Returns, a task each, the confusion counts (C, C) of "student" and, if there is one, "teacher".
    """
    device = set_up_process(payload["cpus"])
    return [_evaluate(task, payload["storage"], device) for task in payload["tasks"]]


def _evaluate(
    task: EvaluationTask, storage: StorageConfig, device: torch.device
) -> dict[str, list[list[int]]]:
    counts = {}
    for name, network in task_networks(task, storage):
        network.to(device)
        network.autocast_dtype = autocast_dtype(task.precision)
        set_batch_norm(network, "sync")
        if task.adapt_data:
            adapt_batch_norm(network, task.adapt_data, storage, device)
        matrix, _ = evaluate_network(network, task.data, storage, device)
        counts[name] = matrix.counts.tolist()
    return counts
