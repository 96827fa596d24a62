"""A number that is not finite on one rank stops all of them before the optimiser moves."""

import pytest

from tests.cluster.checkpoint_ranks import run_rank
from tests.processes import run_ranks

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divergence")
    cases = [(stage, precision) for stage in STAGES for precision in ("fp32", "fp16")]
    run_ranks(run_rank, 2, str(folder), "diverge", cases)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_stops_both_and_moves_nothing(outcomes, stage):
    said = (outcomes / f"{stage}-fp32.txt").read_text().splitlines()
    assert said == ["the gradient of step 1 is not finite; moved: []"] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_under_fp16_the_loss_scale_s_overflow_is_no_divergence_and_nan_is(outcomes, stage):
    said = (outcomes / f"{stage}-fp16.txt").read_text().splitlines()
    nan = "the gradient of step 1 is not finite; moved: []"
    assert said == ["no error; moved: []", nan] * 2
