"""Numbers of the method authors' implementation (tests/data, made by their code), reproduced.

Losses and gradients hold within 2e-5 of the largest value + 1e-7 + 4 x the stored float32 gap.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sepico import augment, losses
from sepico.config import OptimizationConfig
from sepico.metrics import ConfusionMatrix
from sepico.schedule import ema_decay, learning_rate
from sepico.statistics import ClassStatistics

DATA = Path(__file__).parent.parent / "data"
CLASSES = 19


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / f"{name}.npz"))


def ints(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


@pytest.mark.parametrize("case", range(6))
def test_downscaled_labels(case):
    stored = golden("label_down")
    factor, min_ratio, num_classes, ignore = stored[f"par_{case}"].tolist()
    result = losses.downscale_labels(
        ints(stored[f"gt_{case}"]),
        int(factor),
        num_classes=int(num_classes),
        min_ratio=min_ratio,
        ignore_index=int(ignore),
    )
    assert (result.numpy() == stored[f"out_{case}"]).all()


def test_selected_pixels():
    stored = golden("prep")
    features, labels = losses.select_pixels(
        torch.from_numpy(stored["feat_0"]), ints(stored["mask_0"]), num_classes=CLASSES
    )
    assert (features.numpy() == stored["out_feat_0"]).all()
    assert (labels.numpy() == stored["out_mask_0"]).all()


CONTRAST_CASES = [
    (name, temperature, regularized)
    for name in ("loss_a16", "loss_allignore", "loss_a16_oneclass", "loss_a16_norm3")
    for temperature in ("100", "1", "0.1")
    for regularized in (0, 1)
    if f"loss_dist_t{temperature}_r{regularized}" in golden(name)
]


def test_every_stored_contrast_case_is_checked():
    assert len(CONTRAST_CASES) == 22


@pytest.mark.parametrize(("name", "temperature", "regularized"), CONTRAST_CASES)
def test_dist_contrast_and_regularizer(name, temperature, regularized):
    stored = golden(name)
    key = f"dist_t{temperature}_r{regularized}"
    features = torch.from_numpy(stored["feat"]).requires_grad_()
    rows, labels = losses.select_pixels(
        features, ints(stored["mask"]), num_classes=CLASSES, min_ratio=float(stored["min_ratio"])
    )
    mean, variance = torch.from_numpy(stored["mean"]), torch.from_numpy(stored["cov"])
    t = float(temperature)
    loss = losses.dist_contrast(rows, labels, mean, variance, temperature=t)
    if regularized:
        loss = loss + losses.regularizer(rows, mean, temperature=t)
    loss.backward()
    expected, gradient = stored[f"loss64_{key}"], stored[f"grad_{key}"]
    gap = 4 * abs(stored[f"loss_{key}"] - expected)
    assert abs(loss.item() - expected) <= 2e-5 * abs(expected) + 1e-7 + gap
    bound = 2e-5 * np.abs(gradient).max() + 1e-7 + 4 * stored[f"gerr_{key}"]
    assert np.abs(features.grad.numpy() - gradient).max() <= bound


@pytest.mark.parametrize("name", ["estimator_a16", "estimator_a64"])
def test_class_statistics(name):
    stored = golden(name)
    statistics = ClassStatistics(CLASSES, stored["feat_0"].shape[1])
    for k in range(5):
        statistics.update(torch.from_numpy(stored[f"feat_{k}"]), ints(stored[f"label_{k}"]))
        assert np.abs(statistics.mean.numpy() - stored[f"ave_{k}"]).max() < 1e-5
        assert np.abs(statistics.variance.numpy() - stored[f"cov_{k}"]).max() < 1e-5
        assert (statistics.count.numpy() == stored[f"amount_{k}"]).all()


@pytest.mark.parametrize("case", range(4))
def test_class_balanced_crop(case):
    stored = golden("crop")
    boxes = stored[f"boxes_{case}"]
    best, scores = augment.class_balanced_crop(
        ints(stored[f"seg_{case}"]),
        torch.from_numpy(boxes),
        max_ratio=float(stored[f"par_{case}"][2]),
    )
    assert scores.numpy() == pytest.approx(stored[f"scores_{case}"], rel=1e-6)
    assert (boxes[best] == stored[f"best_{case}"]).all()


def test_class_mix_mask():
    stored = golden("classmix")
    mask = augment.class_mix_mask(ints(stored["label"]), [ints(row) for row in stored["chosen"]])
    assert (mask.numpy() == stored["mask"]).all()


@pytest.mark.parametrize("kind", ["plain", "weight"])
def test_cross_entropy(kind):
    stored = golden("ce")
    logits = torch.from_numpy(stored["pred"]).requires_grad_()
    weight = torch.from_numpy(stored["weight"]) if kind == "weight" else None
    loss = losses.cross_entropy(logits, ints(stored["label"])[:, None], weight)
    loss.backward()
    assert loss.item() == pytest.approx(float(stored[f"loss_{kind}"]), rel=1e-5)
    assert np.abs(logits.grad.numpy() - stored[f"grad_{kind}"]).max() < 1e-7


def test_iou():
    stored = golden("iou")
    matrix = ConfusionMatrix(CLASSES)
    for prediction, label in zip(stored["pred"], stored["label"], strict=True):
        matrix.update(ints(prediction), ints(label))
    assert matrix.iou().numpy() == pytest.approx(stored["iou"], nan_ok=True)


def test_learning_rate():
    stored = golden("lr")
    iterations, warmup, ratio, power, _ = stored["par_0"].tolist()
    config = OptimizationConfig(
        iterations=int(iterations),
        lr=float(stored["base_0"][0]),
        warmup=int(warmup),
        warmup_ratio=ratio,
        power=power,
    )
    rates = [learning_rate(int(step), config) for step in stored["iter_0"]]
    assert rates == pytest.approx(stored["lr_0"][:, 0], rel=1e-9)


@pytest.mark.parametrize("case", range(5))
def test_ema(case):
    stored = golden("ema")
    # The authors update before iteration i what we update after step i - 1.
    decay = ema_decay(int(stored[f"iter_{case}"]) - 1, OptimizationConfig(), 0.999)
    before = stored[f"teacher_{case - 1}"] if case in (1, 2) else None
    if before is not None:
        after = torch.from_numpy(before).lerp(
            torch.from_numpy(stored[f"student_{case}"]), 1 - decay
        )
        assert after.numpy() == pytest.approx(stored[f"teacher_{case}"], abs=1e-6)
    assert decay == pytest.approx(min(1 - 1 / (int(stored[f"iter_{case}"]) + 1), 0.999))
