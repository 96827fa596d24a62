"""Pseudo-labels, augmentation, metrics and schedule of the authors' implementation, reproduced."""

import pytest
import torch

from sepico import augment, teacher
from sepico.config import OptimizationConfig
from sepico.metrics import ConfusionMatrix
from sepico.schedule import ema_decay, learning_rate
from tests.sepico.test_parity import CLASSES, golden, ints


@pytest.mark.parametrize("day_ratio", [0.8, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_day_night_fusion(weighted, day_ratio):
    stored = golden("daynight")
    fused = teacher.fuse_day_night(
        torch.from_numpy(stored["day"]),
        torch.from_numpy(stored["night"]),
        class_weight=torch.from_numpy(stored["class_weight"]) if weighted else None,
        day_ratio=day_ratio,
    )
    expected = stored[f"mix{'w' if weighted else ''}_r{day_ratio}"]
    assert fused.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", range(4))
def test_class_balanced_crop(case):
    stored = golden("crop")
    boxes = stored[f"boxes_{case}"]
    best, scores = augment.class_balanced_crop(
        ints(stored[f"seg_{case}"]),
        torch.from_numpy(boxes),
        max_ratio=float(stored[f"par_{case}"][2]),
    )
    assert (scores.numpy() == stored[f"scores_{case}"]).all()
    assert (boxes[best] == stored[f"best_{case}"]).all()


def test_class_mix_mask():
    stored = golden("classmix")
    mask = augment.class_mix_mask(ints(stored["label"]), [ints(row) for row in stored["chosen"]])
    assert (mask.numpy() == stored["mask"]).all()


def test_iou():
    stored = golden("iou")
    matrix = ConfusionMatrix(CLASSES)
    for prediction, label in zip(stored["pred"], stored["label"], strict=True):
        matrix.update(ints(prediction), ints(label))
    assert matrix.iou().numpy() == pytest.approx(stored["iou"], nan_ok=True)


@pytest.mark.parametrize(("prediction", "label"), [(CLASSES, 0), (0, CLASSES), (-1, 3)])
def test_iou_refuses_what_is_no_class(prediction, label):
    matrix = ConfusionMatrix(CLASSES)
    with pytest.raises(ValueError, match="need the same classes"):
        matrix.update(torch.tensor([[1, prediction]]), torch.tensor([[1, label]]))
    matrix.update(torch.tensor([[1, prediction]]), torch.tensor([[1, 255]]))
    assert matrix.iou()[1] == 1


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
