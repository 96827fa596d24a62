"""Distributed evaluation: each worker predicts its share, the confusion matrix is all-reduced."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.engine import set_up_process
from cluster.evaluation import EvaluationTask, Output, mean_ious, task_networks
from cluster.hardware import autocast_dtype
from cluster.loader import load_samples
from cluster.manifest import Manifest
from cluster.reader import Sample, ShardReader, open_reader
from cluster.storage import StorageConfig, open_storage
from cluster.submission import write_part
from sepico.metrics import Certainty, ConfusionMatrix
from sepico.network import Segmentor
from sepico.normalization import set_batch_norm
from sepico.panels import confusion_picture, error_map, image_grid
from sepico.prediction import InferenceConfig, class_probabilities
from sepico.taxonomies import Taxonomy

ADAPT_BATCH = 8  # images whose statistics AdaBN averages


def predict_share(
    network: Segmentor, reader: ShardReader, config: InferenceConfig, device: torch.device
) -> Iterator[tuple[Sample, Tensor]]:
    """This rank's samples with their probabilities (C, H, W), of a network in eval mode.

    A collective: every rank makes equally many forwards, the last ones for nobody, because
    sharded parameters are gathered by all ranks together.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rounds = math.ceil(len(reader.manifest) / world_size)
    # Samples that follow each other lie side by side: one request reads many.
    mine = range(rank * rounds, min((rank + 1) * rounds, len(reader.manifest)))
    indices = [mine[turn] if turn < len(mine) else 0 for turn in range(rounds)]
    for turn, sample in enumerate(load_samples(reader, indices)):
        image = sample.image[None].to(device).float() / 255
        probabilities = class_probabilities(network, image, config)[0]
        if turn < len(mine):
            yield sample, probabilities


@torch.no_grad()
def evaluate_network(
    network: Segmentor, data_url: str, storage: StorageConfig, device: torch.device
) -> tuple[Taxonomy, ConfusionMatrix | None, Certainty]:
    """Data's classes, a network's confusion matrix (None without labels) and certainty.

    A collective.
    """
    reader = open_reader(data_url, storage)
    taxonomy = reader.manifest.taxonomy
    matrix, certainty = None, Certainty(network.num_classes)
    if reader.manifest.labelled:
        matrix = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
    training = network.training
    network.eval()
    for sample, probabilities in predict_share(network, reader, InferenceConfig(), device):
        certainty.update(probabilities[None])
        if matrix is not None:
            matrix.update(probabilities.argmax(0), sample.label.to(device))
    network.train(training)
    for sums in filter(None, (matrix, certainty)):
        sums.all_reduce(device)
    return taxonomy, matrix, certainty


def validate_networks(
    networks: dict[str, Segmentor], data_url: str, storage: StorageConfig, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Percentages NAME_miou, NAME_confidence, ... of each network, and NAME_iou/CLASS.

    A collective. Data without labels has no IoU.
    """
    metrics, per_class = {}, {}
    for name, network in networks.items():
        taxonomy, matrix, certainty = evaluate_network(network, data_url, storage, device)
        measures = certainty.measures()
        if matrix is not None:
            measures |= mean_ious(matrix, taxonomy)
            ious = zip(taxonomy.names, matrix.iou().tolist(), strict=True)
            per_class |= {f"{name}_iou/{key}": 100 * iou for key, iou in ious if iou == iou}
        metrics |= {f"{name}_{key}": 100 * value for key, value in measures.items()}
    return metrics, per_class


@torch.no_grad()
def adapt_batch_norm(
    network: Segmentor,
    data_url: str,
    storage: StorageConfig,
    device: torch.device,
) -> None:
    """AdaBN: replace running statistics by the average over an (unlabelled) data set, in place.

    Batches of about ADAPT_BATCH images (a multiple of the number of workers) over all workers;
    images beyond the last whole batch are left out. A collective.

    Li et al., Adaptive batch normalization for practical domain adaptation (2018).
    """
    reader = open_reader(data_url, storage)
    manifest = reader.manifest
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch = max(min(ADAPT_BATCH, len(manifest)) // world_size, 1) * world_size
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


def evaluate_worker(payload: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Evaluate every task in `tasks` on a Ray Train group; rank 0's answer is complete.

    Returns, a task each, what was found of "student" and, if there is one, "teacher": the
    confusion "counts" (C, C) and the "worst" images, or the keys of a submission's "parts".
    """
    device = set_up_process(payload["cpus"])
    storage, output = payload["storage"], payload["output"]
    return [_evaluate(task, storage, output, device) for task in payload["tasks"]]


def _evaluate(
    task: EvaluationTask, storage: StorageConfig, output: Output, device: torch.device
) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, network in task_networks(task, storage):
        network.to(device)
        network.autocast_dtype = autocast_dtype(task.precision)
        set_batch_norm(network, "sync")
        if task.adapt_data:
            name = f"{name} + AdaBN"
            adapt_batch_norm(network, task.adapt_data, storage, device)
        reader = open_reader(task.data, storage)
        predicted = predict_share(network, reader, output.inference, device)
        act = _measure if reader.manifest.labelled else _submit
        prefix = f"{output.prefix}/{name.lower().replace(' + ', '-')}"
        rows[name] = act(predicted, reader.manifest, storage, output, prefix, device)
    return rows


def _measure(
    predicted: Iterator[tuple[Sample, Tensor]],
    manifest: Manifest,
    storage: StorageConfig,
    output: Output,
    prefix: str,
    device: torch.device,
) -> dict[str, Any]:
    """The confusion matrix and the worst images over all ranks; rank 0 writes their pictures."""
    taxonomy = manifest.taxonomy
    matrix = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
    worst: list[WorstImage] = []
    for sample, probabilities in predicted:
        own = ConfusionMatrix(taxonomy.num_classes, taxonomy.ignore_index)
        labels = probabilities.argmax(0)
        own.update(labels, sample.label.to(device))
        matrix.counts += own.counts
        miou = own.mean_iou()
        if not math.isnan(miou):  # an image without a labelled pixel is neither good nor bad
            worst.append(WorstImage(sample, labels.byte().cpu(), miou))
            worst = sorted(worst, key=lambda image: image.miou)[: output.worst]
    matrix.all_reduce(device)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, worst)
    everywhere = [image for share in shares for image in share]
    worst = sorted(everywhere, key=lambda image: image.miou)[: output.worst]
    if worst and dist.get_rank() == 0:
        store = open_storage(output.folder, storage)
        store.put(f"{prefix}/confusion.png", confusion_picture(matrix.counts, taxonomy))
        store.put(f"{prefix}/worst.png", _picture(worst, taxonomy))
    found = [{"key": image.sample.key, "miou": round(100 * image.miou, 2)} for image in worst]
    return {"counts": matrix.counts.tolist(), "worst": found}


@dataclass
class WorstImage:
    """An image, its predicted labels (H, W) uint8 and their mIoU, a fraction."""

    sample: Sample
    labels: Tensor
    miou: float


def _picture(worst: list[WorstImage], taxonomy: Taxonomy) -> bytes:
    rows = []
    for image in worst:
        truth, labels = image.sample.label.numpy(), image.labels.numpy()
        rows.append(
            [
                (f"{image.sample.key}: {100 * image.miou:.1f}", _pixels(image.sample)),
                ("truth", taxonomy.paint(truth)),
                ("prediction", taxonomy.paint(labels)),
                ("wrong in red", error_map(labels, truth, taxonomy.ignore_index)),
            ]
        )
    return image_grid(rows, taxonomy)


def _pixels(sample: Sample) -> np.ndarray:
    return sample.image.permute(1, 2, 0).numpy()


def _submit(
    predicted: Iterator[tuple[Sample, Tensor]],
    manifest: Manifest,
    storage: StorageConfig,
    output: Output,
    prefix: str,
    device: torch.device,
) -> dict[str, Any]:
    """Each rank writes the part of a submission that holds its images."""
    named = ((sample.key, probabilities) for sample, probabilities in predicted)
    parts = [f"{prefix}/part-{rank:05d}.zip" for rank in range(dist.get_world_size())]
    store = open_storage(output.folder, storage)
    write_part(named, store, parts[dist.get_rank()], output.invalid_below)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    return {"parts": parts}
