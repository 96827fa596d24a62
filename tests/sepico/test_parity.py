"""Losses and statistics of the method authors' implementation (tests/data), reproduced.

Losses and gradients hold within 2e-5 of the largest value + 1e-7 + 4 x the stored float32 gap.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sepico import losses
from sepico.config import ContrastConfig, MethodConfig, ModelConfig
from sepico.contrast import PixelContrast
from sepico.statistics import ClassStatistics, FeatureBank

DATA = Path(__file__).parent.parent / "data"
CLASSES = 19


def golden(name: str, folder: Path = DATA) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"{name}.npz"))


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


@pytest.mark.parametrize("case", range(3))
def test_selected_pixels(case):
    stored = golden("prep")
    features = torch.from_numpy(stored[f"feat_{case}"])
    labels = at_the_grid(features, stored[f"mask_{case}"], stored[f"pool_{case}"])
    rows, classes = losses.select_pixels(features, labels, num_classes=CLASSES)
    assert (rows.numpy() == stored[f"out_feat_{case}"]).all()
    assert (classes.numpy() == stored[f"out_mask_{case}"]).all()


def at_the_grid(features: torch.Tensor, mask: np.ndarray, pool: np.ndarray) -> torch.Tensor:
    """Labels as they came (pool 1: a majority vote is to follow) or the nearest at the features."""
    if pool:
        return ints(mask)
    return F.interpolate(ints(mask).float(), features.shape[-2:], mode="nearest").long()


VARIANTS = ("proto", "dist", "bank")
TEMPERATURES = ("100", "1", "0.1")
ContrastCase = tuple[str, str, str, int]


def contrast_cases(folder: Path, names: list[str]) -> list[ContrastCase]:
    """(file, variant, temperature, weight of the regulariser) of every stored loss."""
    return [
        (name, *case)
        for name in names
        for case in product(VARIANTS, TEMPERATURES, (0, 1))
        if "loss_{}_t{}_r{}".format(*case) in golden(name, folder)
    ]


CONTRAST_CASES = contrast_cases(DATA, sorted(path.stem for path in DATA.glob("loss_*.npz")))


def test_every_stored_contrast_case_is_checked():
    assert len(CONTRAST_CASES) == 114


def stored_bank(stored: dict[str, np.ndarray]) -> FeatureBank:
    """The authors' bank; a class that holds only their initial zero row keeps it."""
    counts = stored["bank_counts"]
    bank = FeatureBank(CLASSES, stored["bank_rows"].shape[1], max(1, int(counts.max())))
    rows = np.split(stored["bank_rows"], np.cumsum(counts)[:-1])
    for age in range(bank.length):
        present = torch.from_numpy(counts > age)
        means = [of_class[min(age, len(of_class) - 1)] for of_class in rows]
        bank.update(torch.from_numpy(np.stack(means)), present)
    return bank


def contrast(variant, rows, labels, stored, temperature):
    options = {"temperature": temperature}
    mean = torch.from_numpy(stored["mean"])
    if variant == "bank":
        return losses.bank_contrast(rows, labels, stored_bank(stored), **options)
    if "class_weight" in stored:
        options["class_weight"] = torch.from_numpy(stored["class_weight"])
    if variant == "proto":
        return losses.proto_contrast(rows, labels, mean, **options)
    return losses.dist_contrast(rows, labels, mean, torch.from_numpy(stored["cov"]), **options)


def kept_pixels(features: torch.Tensor, stored) -> tuple[torch.Tensor, torch.Tensor]:
    mask = at_the_grid(features, stored["mask"], stored["pool"])
    ratio = float(stored["min_ratio"])
    return losses.select_pixels(features, mask, num_classes=CLASSES, min_ratio=ratio)


def check_contrast(case: ContrastCase, folder: Path = DATA) -> None:
    """Loss and gradient of the map of features, with the regulariser where the case has it."""
    name, variant, temperature, regularized = case
    stored = golden(name, folder)
    key = f"{variant}_t{temperature}_r{regularized}"
    features = torch.from_numpy(stored["feat"]).requires_grad_()
    rows, labels = kept_pixels(features, stored)
    t = float(temperature)
    loss = contrast(variant, rows, labels, stored, t)
    if regularized:
        mean = torch.from_numpy(stored["mean"])
        loss = loss + losses.regularizer(rows, mean, temperature=t)
    loss.backward()
    expected, gradient = stored[f"loss64_{key}"], stored[f"grad_{key}"]
    gap = 4 * abs(stored[f"loss_{key}"] - expected)
    assert abs(loss.item() - expected) <= 2e-5 * abs(expected) + 1e-7 + gap
    bound = 2e-5 * np.abs(gradient).max() + 1e-7 + 4 * stored[f"gerr_{key}"]
    assert np.abs(features.grad.numpy() - gradient).max() <= bound


@pytest.mark.parametrize("case", CONTRAST_CASES, ids=str)
def test_contrast_and_regularizer(case):
    check_contrast(case)


def check_regularizer(name: str, temperature: str, folder: Path = DATA) -> None:
    """R alone and its gradient of the kept rows.

    At temperature 100 the stored float32 gradient is off by 4e-4 of the largest value, and smaller
    than 1e-7: there the formula in float64 is what counts.
    """
    stored = golden(name, folder)
    rows, _ = kept_pixels(torch.from_numpy(stored["feat"]), stored)
    exact = rows.detach().double().requires_grad_()
    rows.requires_grad_()
    mean, t = torch.from_numpy(stored["mean"]), float(temperature)
    spread = losses.regularizer(rows, mean, temperature=t)
    spread.backward()
    assert spread.item() == pytest.approx(float(stored[f"reg_t{temperature}"]), rel=2e-5)
    gradient = stored[f"reggrad_t{temperature}"]
    assert np.abs(rows.grad.numpy() - gradient).max() <= 2e-5 * np.abs(gradient).max() + 1e-7

    p = (exact.mean(0) @ mean.double().T / t).softmax(0)
    (p.log().sum() / (CLASSES * np.log(CLASSES))).backward()
    assert (rows.grad - exact.grad).abs().max() <= 2e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["loss_a16", "loss_a16_classweight"])
def test_regularizer_alone(name, temperature):
    check_regularizer(name, temperature)


def check_statistics(name: str, folder: Path = DATA) -> None:
    """Count, mean and variance after each of five updates."""
    stored = golden(name, folder)
    statistics = ClassStatistics(CLASSES, stored["feat_0"].shape[1])
    for k in range(5):
        statistics.update(torch.from_numpy(stored[f"feat_{k}"]), ints(stored[f"label_{k}"]))
        assert np.abs(statistics.mean.numpy() - stored[f"ave_{k}"]).max() < 1e-5
        assert np.abs(statistics.variance.numpy() - stored[f"cov_{k}"]).max() < 1e-5
        assert (statistics.count.numpy() == stored[f"amount_{k}"]).all()


@pytest.mark.parametrize("name", ["estimator_a16", "estimator_a64"])
def test_class_statistics(name):
    check_statistics(name)


@pytest.mark.parametrize("name", ["estimator_a16", "estimator_a64"])
def test_feature_bank_holds_the_authors_rows_without_their_zero_row(name):
    stored = golden(name)
    statistics = ClassStatistics(CLASSES, stored["feat_0"].shape[1])
    length = int(max(stored[f"bankcounts_{k}"].max() for k in range(5)))
    bank = FeatureBank(CLASSES, statistics.feature_dim, length)
    for k in range(5):
        features, labels = torch.from_numpy(stored[f"feat_{k}"]), ints(stored[f"label_{k}"])
        means, counts = statistics.update(features, labels)
        bank.update(means, counts > 0)
        of_class = np.split(stored[f"bankrows_{k}"], np.cumsum(stored[f"bankcounts_{k}"])[:-1])
        for c, rows in enumerate(of_class):
            pushed = rows[np.abs(rows).sum(1) > 0]
            assert bank.rows(c)[-len(pushed) :].numpy() == pytest.approx(pushed, abs=1e-5)


def stage_contrast(variant: str, stored, stages: tuple[int, ...], **options) -> PixelContrast:
    """The loss of these encoder stages at temperature 1, with the stored statistics of each."""
    width = stored["mean_0"].shape[1]
    model = ModelConfig(
        projection_channels=width,
        projection_stages=stages,
        projection_mode="per_layer",
        num_classes=CLASSES,
    )
    config = ContrastConfig(temperature=1.0, **options)
    contrast = PixelContrast(MethodConfig(method=f"{variant}cl", model=model, contrast=config))
    contrast.load_state_dict({
        f"statistics.{i}.{name}": torch.from_numpy(value).double()
        for i, stage in enumerate(stages)
        for name, value in (
            ("count", np.ones(CLASSES)),
            ("mean", stored[f"mean_{stage}"]),
            ("variance", stored[f"cov_{stage}"]),
        )
    })  # fmt: skip
    return contrast


@pytest.mark.parametrize("weights", ["w1", "wlist"])
@pytest.mark.parametrize("variant", ["proto", "dist"])
def test_sum_over_encoder_stages(variant, weights):
    stored = golden("module_layers")
    stage_weights = (1.0,) * 4 if weights == "w1" else (0.1, 0.2, 0.3, 0.4)
    contrast = stage_contrast(
        variant, stored, (0, 1, 2, 3), regularizer_weight=0.5, stage_weights=stage_weights
    )
    features = [torch.from_numpy(stored[f"feat_{i}"]).requires_grad_() for i in range(4)]
    labels = ints(stored["mask"])
    total, _ = contrast.loss(features, labels, contrast.kept(features, labels))
    total.backward()
    key = f"{variant}_{weights}"
    assert total.item() == pytest.approx(float(stored[f"loss_{key}"]), rel=2e-5)
    for i in range(4):
        gradient = stored[f"grad_{key}_{i}"]
        assert (
            np.abs(features[i].grad.numpy() - gradient).max() <= 2e-5 * abs(gradient).max() + 1e-7
        )


@pytest.mark.parametrize("regularized", [0, 1])
def test_one_encoder_stage(regularized):
    stored = golden("module_layers")
    contrast = stage_contrast("dist", stored, (1,), weight=2.0, regularizer_weight=regularized)
    features, labels = [torch.from_numpy(stored["feat_1"])], ints(stored["mask"])
    total, _ = contrast.loss(features, labels, contrast.kept(features, labels))
    expected = float(stored[f"single_dist_mean_reg{regularized}"])
    assert total.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", ["plain", "weight", "class"])
def test_cross_entropy(kind):
    stored = golden("ce")
    logits = torch.from_numpy(stored["pred"]).requires_grad_()
    weight = torch.from_numpy(stored["weight"]) if kind != "plain" else None
    class_weight = torch.from_numpy(stored["class_weight"]) if kind == "class" else None
    labels = ints(stored["label"])[:, None]
    loss = losses.cross_entropy(logits, labels, weight, class_weight=class_weight)
    loss.backward()
    assert loss.item() == pytest.approx(float(stored[f"loss_{kind}"]), rel=1e-5)
    assert np.abs(logits.grad.numpy() - stored[f"grad_{kind}"]).max() < 1e-7
