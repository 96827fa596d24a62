"""A number that is not finite on one rank stops all of them before the optimiser moves."""

import pytest
import torch.multiprocessing

from tests.cluster.checkpoint_ranks import run_rank

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divergence")
    stages = [(stage,) for stage in STAGES]
    torch.multiprocessing.spawn(run_rank, (2, str(folder), "diverge", stages), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_stops_both_and_moves_nothing(outcomes, stage):
    said = (outcomes / f"{stage}.txt").read_text().splitlines()
    assert said == ["the gradient of step 1 is not finite; moved: []"] * 2
