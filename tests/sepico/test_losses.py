"""What the losses do with inputs of every size and layout, and with bad input."""

import pytest
import torch
from torch.nn.functional import normalize

from sepico import losses
from sepico.config import MethodConfig, ModelConfig
from sepico.contrast import PixelContrast
from sepico.statistics import CHUNK, ClassStatistics, FeatureBank

CLASSES, WIDTH = 5, 8
TERMS = ["proto", "dist", "bank", "regularizer"]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


MEAN, VARIANCE = normalize(draw(CLASSES, WIDTH), dim=1), draw(CLASSES, WIDTH).square()


def bank_without(absent: int) -> FeatureBank:
    """A full bank of 3 rows a class, none of the absent one."""
    bank = FeatureBank(CLASSES, WIDTH, length=3)
    for rows in draw(4, CLASSES, WIDTH):
        bank.update(rows, torch.arange(CLASSES) != absent)
    return bank


def loss_of(term: str, rows, labels, temperature=0.5, absent=-1, **weights) -> torch.Tensor:
    options = {"temperature": temperature, **weights}
    if term == "proto":
        return losses.proto_contrast(rows, labels, MEAN, **options)
    if term == "dist":
        return losses.dist_contrast(rows, labels, MEAN, VARIANCE, **options)
    if term == "bank":
        return losses.bank_contrast(rows, labels, bank_without(absent), **options)
    return losses.regularizer(rows, MEAN, temperature=temperature)


def dist_as_written(rows: torch.Tensor, labels: torch.Tensor, t: float) -> torch.Tensor:
    mean, variance = MEAN.double(), VARIANCE.double()
    logits = rows @ mean.T / t + rows.square() @ variance.T / (2 * t**2)
    return (logits.logsumexp(1) - (rows * mean[labels]).sum(1) / t).mean()


def bank_as_written(rows: torch.Tensor, labels: torch.Tensor, t: float, absent) -> torch.Tensor:
    bank = bank_without(absent)
    total = rows.sum() * 0
    for y in {*range(CLASSES)} - {absent}:
        q = rows[labels == y]
        positive = (q @ bank.rows(y).double().T / t).exp()
        negative = sum(
            (q @ bank.rows(k).double().mean(0) / t).exp()
            for k in range(CLASSES)
            if k not in (y, absent)
        )
        total = total - (positive / (positive + negative[:, None])).log().mean(1).sum()
    return total / len(rows)


@pytest.mark.parametrize(("term", "absent"), [("dist", -1), ("bank", -1), ("bank", 2)])
def test_the_gradient_by_hand_is_that_of_the_formula(term, absent):
    # More pixels of one class than are taken at once, and some of every class.
    labels = torch.cat([torch.ones(CHUNK + 100, dtype=torch.int64), torch.arange(200) % CLASSES])
    rows = normalize(draw(len(labels), WIDTH), dim=1).requires_grad_()
    exact = rows.detach().double().requires_grad_()
    expected = (
        dist_as_written(exact, labels, 0.5)
        if term == "dist"
        else bank_as_written(exact, labels, 0.5, absent)
    )
    expected.backward()
    loss = loss_of(term, rows, labels, absent=absent)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (rows.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("term", TERMS)
def test_float64_features_are_computed_in_float64(term):
    rows, labels = draw(7, WIDTH).double().requires_grad_(), torch.arange(7) % CLASSES
    assert torch.autograd.gradcheck(lambda q: loss_of(term, q, labels), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_selected_pixels_and_their_gradient_have_the_place_of_their_label(layout, dtype):
    features = draw(2, WIDTH, 40, 40).to(dtype)  # an image has more pixels than are moved at once
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        features = features.repeat(1, 2, 1, 1)[:, ::2]
    features.requires_grad_()
    labels = torch.arange(2 * 40 * 40).view(2, 1, 40, 40) % (CLASSES + 1)
    labels[labels == CLASSES] = 255
    rows, classes = losses.select_pixels(features, labels, num_classes=CLASSES)
    kept = (labels != 255).squeeze(1)
    assert torch.equal(rows, features.permute(0, 2, 3, 1)[kept])
    assert torch.equal(classes, labels[:, 0][kept])
    weight = draw(*rows.shape).to(dtype)
    (rows * weight).sum().backward()
    gradient = features.grad.permute(0, 2, 3, 1)
    assert torch.equal(gradient[kept], weight)
    assert not gradient[~kept].any()


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_without_a_labelled_pixel_gives_a_zero_that_carries_a_graph(term):
    features = draw(2, WIDTH, 3, 3).requires_grad_()
    labels = torch.full((2, 1, 12, 12), 255)
    rows, classes = losses.select_pixels(features, labels, num_classes=CLASSES)
    loss = loss_of(term, rows, classes)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("method", ["protocl", "distcl", "bankcl"])
def test_a_step_without_a_labelled_pixel_gives_a_zero_that_carries_a_graph(method):
    contrast = PixelContrast(MethodConfig(method, model(CLASSES)))
    features = draw(2, WIDTH, 3, 3).requires_grad_()
    labels = torch.full((2, 1, 12, 12), 255)
    counts = contrast.merge(contrast.batch_sums(features.detach(), labels))
    loss, parts = contrast.loss(features, labels, counts.float())
    loss.backward()
    assert loss.item() == parts["contrast"].item() == parts["regularizer"].item() == 0
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("term", TERMS)
def test_a_small_temperature_does_not_overflow(term):
    rows = normalize(draw(50, WIDTH), dim=1).requires_grad_()
    loss = loss_of(term, rows, torch.arange(50) % CLASSES, temperature=1e-3)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("term", ["proto", "dist", "bank"])
def test_labels_of_any_integer_type_are_the_same_labels(term, dtype):
    rows, labels = draw(CLASSES, WIDTH), torch.arange(CLASSES).flip(0)
    # As many pixels as classes: a weight a class indexed with bytes would take them for a mask.
    weights = {} if term == "bank" else {"class_weight": draw(CLASSES).square()}
    expected = loss_of(term, rows, labels, **weights)
    assert torch.equal(loss_of(term, rows, labels.to(dtype), **weights), expected)


@pytest.mark.parametrize("term", ["proto", "dist", "bank"])
def test_every_pixel_needs_a_label(term):
    with pytest.raises(ValueError, match="6 features, but 1 labels"):
        loss_of(term, draw(6, WIDTH), torch.tensor([1]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("term", TERMS)
def test_a_temperature_that_is_not_above_zero_is_refused(term, temperature):
    with pytest.raises(ValueError, match="it must be above 0"):
        loss_of(term, draw(6, WIDTH), torch.arange(6) % CLASSES, temperature)


def test_a_class_without_rows_in_the_bank_is_no_positive_and_no_negative():
    rows, labels = draw(CLASSES, WIDTH).requires_grad_(), torch.arange(CLASSES)
    total = loss_of("bank", rows, labels, absent=2) * CLASSES
    total.backward()
    assert rows.grad[2].abs().max() == 0
    rest = labels != 2
    expected = loss_of("bank", rows[rest], labels[rest], absent=2) * (CLASSES - 1)
    assert total.item() == pytest.approx(expected.item())
    assert total.item() < CLASSES * loss_of("bank", rows, labels).item()


def test_a_class_without_a_negative_has_loss_and_gradient_zero():
    bank = FeatureBank(CLASSES, WIDTH, length=3)
    bank.update(draw(CLASSES, WIDTH), torch.arange(CLASSES) == 1)
    rows = draw(6, WIDTH).requires_grad_()
    loss = losses.bank_contrast(rows, torch.ones(6, dtype=torch.int64), bank, temperature=0.5)
    loss.backward()
    assert loss.item() == 0
    assert rows.grad.abs().max() == 0


def test_an_empty_bank_gives_a_zero_that_carries_a_graph():
    rows = draw(6, WIDTH).requires_grad_()
    bank = FeatureBank(CLASSES, WIDTH, length=3)
    loss = losses.bank_contrast(rows, torch.arange(6) % CLASSES, bank, temperature=0.5)
    loss.backward()
    assert loss.item() == 0
    assert rows.grad.abs().max() == 0


@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("term", TERMS)
def test_a_feature_that_is_not_a_number_makes_the_loss_not_a_number(term, label):
    rows, labels = draw(6, WIDTH), torch.arange(6) % 3
    rows[label, 1] = torch.nan
    assert loss_of(term, rows, labels, absent=2).isnan()


LOGITS = torch.zeros(1, CLASSES, 1, 3)
ROWS, OF_ROWS, WEIGHT = torch.zeros(6, WIDTH), torch.arange(6) % CLASSES, torch.ones(CLASSES)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: dist(ROWS, variance=VARIANCE[:1]), "variance has shape"),
        (lambda: dist(ROWS, variance=VARIANCE[:-1]), "variance has shape"),
        (lambda: dist(ROWS, variance=draw(CLASSES + 1, WIDTH)), "variance has shape"),
        (lambda: dist(ROWS, variance=VARIANCE[:, :1]), "variance has shape"),
        (lambda: dist(ROWS, class_weight=WEIGHT[:-1]), "class_weight has shape"),
        (lambda: dist(ROWS[:, :-1]), "mean has shape"),
        (lambda: loss_of("proto", ROWS, OF_ROWS, class_weight=WEIGHT[:-1]), "class_weight has"),
        (lambda: loss_of("proto", ROWS[:, :-1], OF_ROWS), "mean has shape"),
        (lambda: loss_of("bank", ROWS[:, :-1], OF_ROWS), "features has shape"),
        (lambda: loss_of("regularizer", ROWS[:, :-1], OF_ROWS), "mean has shape"),
        (lambda: cross_entropy(0, torch.ones(1, 1, 1, 3)), "weight has shape"),
        (lambda: cross_entropy(0, torch.ones(1, 3)), "weight has shape"),
        (lambda: losses.cross_entropy(LOGITS, torch.zeros(1, 3, 1, 3)), "labels has shape"),
        (lambda: losses.cross_entropy(LOGITS, torch.zeros(1, 1, 3)), "labels has shape"),
        (lambda: cross_entropy(CLASSES), "need the same classes"),
        (lambda: cross_entropy(-1), "need the same classes"),
    ],
)
def test_classes_and_widths_that_differ_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def dist(rows: torch.Tensor, variance: torch.Tensor = VARIANCE, **weights) -> torch.Tensor:
    return losses.dist_contrast(rows, OF_ROWS, MEAN, variance, temperature=0.5, **weights)


def cross_entropy(label: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    labels = torch.tensor([0, 255, label]).view(1, 1, 1, 3)
    return losses.cross_entropy(LOGITS, labels, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_around_a_contrast_changes_nothing(dtype):
    def result(term: str, enabled: bool) -> list[torch.Tensor]:
        rows = normalize(draw(60, WIDTH), dim=1).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = loss_of(term, rows, torch.arange(60) % CLASSES, temperature=0.1)
        loss.backward()
        return [loss.detach(), rows.grad]

    for term in TERMS:
        assert all(map(torch.equal, result(term, True), result(term, False))), term


def test_cross_entropy_of_low_precision_is_computed_in_float32():
    logits = draw(1, CLASSES, 4, 4).bfloat16().requires_grad_()
    labels, weight = torch.arange(64).view(1, 1, 8, 8) % CLASSES, torch.ones(CLASSES).double()
    loss = losses.cross_entropy(logits, labels, class_weight=weight)
    assert torch.equal(loss, losses.cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("term", ["proto", "dist"])
def test_class_weights_of_another_precision_than_the_features_are_taken(term):
    rows, weight = draw(6, WIDTH).double(), draw(CLASSES).square()
    loss = loss_of(term, rows, OF_ROWS, class_weight=weight)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, loss_of(term, rows, OF_ROWS, class_weight=weight.double()))


@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (1, 12, 12), (1, 1, 0, 0), (1, 1, 12, 0)])
def test_labels_that_are_no_plane_an_image_are_refused(shape):
    labels = torch.zeros(shape)
    with pytest.raises(ValueError, match="label_map has shape"):
        losses.select_pixels(torch.zeros(1, 2, 3, 3), labels, num_classes=CLASSES)
    with pytest.raises(ValueError, match="label_map has shape"):
        losses.downscale_labels(labels, 4, num_classes=CLASSES, min_ratio=0.75)


def test_a_feature_grid_without_a_pixel_is_refused():
    with pytest.raises(ValueError, match="no whole multiple"):
        losses.select_pixels(torch.zeros(1, 2, 0, 0), torch.zeros(1, 1, 8, 8), num_classes=5)


@pytest.mark.parametrize("size", [(24, 33), (25, 32), (48, 32), (24, 64), (2, 3)])
def test_labels_that_do_not_fit_the_feature_grid_are_refused(size):
    with pytest.raises(ValueError, match="no whole multiple"):
        losses.select_pixels(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, *size), num_classes=5)


def test_labels_of_another_batch_size_are_refused():
    with pytest.raises(ValueError, match="2 feature maps, but labels of 1 images"):
        losses.select_pixels(torch.zeros(2, 2, 3, 4), torch.zeros(1, 1, 6, 8), num_classes=5)


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_of_more_classes_than_the_network_has_are_refused(label, factor):
    labels = torch.full((1, 1, 12, 12), 255)
    labels[..., 5] = label
    features = torch.zeros(1, WIDTH, 12 // factor, 12 // factor)
    with pytest.raises(ValueError, match="need the same classes"):
        losses.select_pixels(features, labels, num_classes=CLASSES)


@pytest.mark.parametrize("term", ["proto", "dist", "bank"])
def test_labels_of_more_classes_than_the_statistics_have_are_refused(term):
    with pytest.raises(ValueError, match="need the same classes"):
        loss_of(term, draw(2, WIDTH), torch.tensor([0, CLASSES]))
    with pytest.raises(ValueError, match="need the same classes"):
        ClassStatistics(CLASSES, WIDTH).update(draw(2, WIDTH), torch.tensor([0, CLASSES]))


def model(num_classes: int) -> ModelConfig:
    return ModelConfig(num_classes=num_classes, projection_channels=WIDTH)


@pytest.mark.parametrize("method", ["distcl", "bankcl"])
def test_statistics_of_another_number_of_classes_are_not_loaded(method):
    stored = PixelContrast(MethodConfig(method, model(CLASSES))).state_dict()
    with pytest.raises(ValueError, match="have shapes"):
        PixelContrast(MethodConfig(method, model(CLASSES + 1))).load_state_dict(stored)


def test_a_bank_of_another_number_of_classes_is_not_loaded():
    with pytest.raises(ValueError, match="the feature bank has shape"):
        FeatureBank(CLASSES + 1, WIDTH, 3).load_state_dict(bank_without(-1).state_dict())
