"""Stored numbers of the authors' implementation that are too large for tests/data.

They lie beside the repository, in ../shared/golden; without that folder nothing is run.
"""

from itertools import product
from pathlib import Path

import pytest

from tests.sepico.test_parity import (
    DATA,
    TEMPERATURES,
    check_contrast,
    check_regularizer,
    check_statistics,
    contrast_cases,
)

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
LARGE = sorted({p.stem for p in FOLDER.glob("*.npz")} - {p.stem for p in DATA.glob("*.npz")})
LOSSES = [name for name in LARGE if name.startswith("loss_")]

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="no folder ../shared/golden"),
]


def test_every_large_case_is_checked():
    assert {"loss_a512", "loss_a64_absent", "estimator_a512"} <= set(LARGE)
    assert len(contrast_cases(FOLDER, LOSSES)) == 36


@pytest.mark.parametrize("case", contrast_cases(FOLDER, LOSSES), ids=str)
def test_contrast_and_regularizer(case):
    check_contrast(case, FOLDER)


@pytest.mark.parametrize(("name", "temperature"), product(LOSSES, TEMPERATURES))
def test_regularizer_alone(name, temperature):
    check_regularizer(name, temperature, FOLDER)


@pytest.mark.parametrize("name", [name for name in LARGE if name.startswith("estimator_")])
def test_class_statistics(name):
    check_statistics(name, FOLDER)
