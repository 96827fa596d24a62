"""What the class statistics hold: float64's precision, and damage where it happened."""

import pytest
import torch

from sepico.statistics import CHUNK, ClassStatistics, FeatureBank

CLASSES, WIDTH = 3, 2


def draw(rows: int, mean: float, std: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return mean + std * torch.randn(rows, WIDTH, generator=generator)


@pytest.mark.parametrize(
    "features",
    [
        torch.tensor([[2.1, 2.2]]).expand(3 * CHUNK + 7, -1),  # the same row, of norm 3
        draw(3 * CHUNK + 7, 30, 0.1),
        draw(3 * CHUNK + 7, 0, 3),
    ],
    ids=["constant", "far from zero", "wide"],
)
def test_mean_and_variance_hold_to_1e_5(features):
    statistics = ClassStatistics(CLASSES, WIDTH)
    for part in features.split(CHUNK + 500):  # two updates of more rows than are taken at once
        statistics.update(part, torch.ones(len(part), dtype=torch.int64))
    exact = features.double()
    assert (statistics.mean[1] - exact.mean(0)).abs().max() < 1e-5
    assert (statistics.variance[1] - exact.var(0, correction=0)).abs().max() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
def test_a_feature_out_of_range_stays_in_its_class(value):
    features, labels = draw(30, 0, 1), torch.arange(30) % CLASSES
    expected = ClassStatistics(CLASSES, WIDTH)
    expected.update(features, labels)
    features[1, 0] = value
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.update(features, labels)
    assert not statistics.mean[1, 0].abs() < 1e18  # it is not hidden
    assert not statistics.variance[1, 0].abs() < 1e18
    others = torch.arange(CLASSES) != 1
    assert torch.equal(statistics.mean[others], expected.mean[others])
    assert torch.equal(statistics.variance[others], expected.variance[others])


def test_pixels_are_counted_above_2_to_the_24():
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.count.fill_(2**24)
    for _ in range(3):
        statistics.update(draw(1, 0, 1), torch.tensor([0]))
    assert statistics.count.tolist() == [2**24 + 3, 2**24, 2**24]


ROWS, LABELS, PRESENT = torch.zeros(6, WIDTH), torch.zeros(6, dtype=torch.int64), torch.ones(3) > 0


@pytest.mark.parametrize(
    ("features", "labels", "named"),
    [
        (ROWS[:, :1], LABELS, "features has shape"),
        (torch.zeros(6, WIDTH + 1), LABELS, "features has shape"),
        (ROWS[:5], LABELS, "features has shape"),
        (ROWS, LABELS + CLASSES, "need the same classes"),
    ],
)
def test_statistics_refuse_what_does_not_fit(features, labels, named):
    with pytest.raises(ValueError, match=named):
        ClassStatistics(CLASSES, WIDTH).update(features, labels)


@pytest.mark.parametrize(
    ("means", "present", "named"),
    [
        (torch.zeros(2, WIDTH), PRESENT[:2], "class_means has shape"),
        (torch.zeros(4, WIDTH), torch.ones(4) > 0, "class_means has shape"),
        (torch.zeros(CLASSES, 1), PRESENT, "class_means has shape"),
        (torch.zeros(CLASSES, WIDTH), PRESENT[:2], "present has shape"),
    ],
)
def test_a_bank_refuses_what_does_not_fit(means, present, named):
    with pytest.raises(ValueError, match=named):
        FeatureBank(CLASSES, WIDTH, length=2).update(means, present)


def test_a_bank_holds_at_least_one_row():
    with pytest.raises(ValueError, match="length is 0"):
        FeatureBank(CLASSES, WIDTH, length=0)


def test_statistics_of_lower_precision_are_loaded():
    statistics = ClassStatistics(2, 3)
    statistics.load_state_dict({k: v.float() for k, v in statistics.state_dict().items()})
    statistics.update(torch.ones(2, 3), torch.tensor([0, 1]))
    assert statistics.count.tolist() == [1, 1]
