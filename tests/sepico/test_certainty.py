"""How sure predictions are, where labels are missing."""

import math

import pytest
import torch

from sepico.metrics import Certainty


def certainty(probabilities: torch.Tensor) -> dict[str, float]:
    """Measures of pixels (N, C), added in two parts."""
    measured = Certainty(probabilities.shape[1])
    for part in probabilities.T[None, :, :, None].chunk(2, dim=2):
        measured.update(part)
    return measured.measures()


def test_the_measures_are_the_means_of_their_definitions():
    p = torch.rand(50, 4).softmax(1)
    entropy = -(p * p.log()).sum(1).mean().item() / math.log(4)
    of_mean = -(p.mean(0) * p.mean(0).log()).sum().item() / math.log(4)
    found = certainty(p)
    assert found["confidence"] == pytest.approx(p.amax(1).mean().item(), abs=1e-6)
    assert found["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert found["information"] == pytest.approx(of_mean - entropy, abs=1e-6)


def test_information_tells_a_collapse_to_one_class_from_sure_predictions():
    sure = torch.full((8, 4), 1e-9) + torch.eye(4).repeat(2, 1)
    collapsed = sure[:1].repeat(8, 1)
    assert certainty(collapsed)["confidence"] == pytest.approx(certainty(sure)["confidence"])
    assert certainty(sure)["information"] == pytest.approx(1, abs=1e-4)
    assert certainty(collapsed)["information"] == pytest.approx(0, abs=1e-4)
