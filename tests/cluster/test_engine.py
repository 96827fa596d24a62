"""The engine computes what plain PyTorch computes, for any ZeRO stage and number of workers."""

import pytest
import torch
import torch.multiprocessing

from tests.cluster.engine_ranks import plain_pytorch, run_rank

CASES = [(stage, "distcl") for stage in (0, 1, 2, 3)] + [(1, "source_only")]
# A constant added before a batch-norm is removed by it: these gradients are round-off, which
# Adam turns into full steps.
NO_GRADIENT = "head.embeddings"


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[dict, dict]]:
    torch.set_num_threads(1)
    return {method: plain_pytorch(method) for method in ("distcl", "source_only")}


@pytest.fixture(scope="module", params=[1, 2], ids=["1-worker", "2-workers"])
def trained(request, tmp_path_factory) -> dict[tuple[int, str], dict]:
    """Final states of all cases at one world size."""
    folder = tmp_path_factory.mktemp("engine")
    world_size = request.param
    torch.multiprocessing.spawn(run_rank, (world_size, str(folder), CASES), nprocs=world_size)
    return {
        (stage, method): torch.load(folder / f"{world_size}-{stage}-{method}.pt")
        for stage, method in CASES
    }


def _distance(state: dict, expected: dict, initial: dict, part: str) -> float:
    """|theta - expected| / |expected - theta_0| over the float tensors of a part."""
    difference, moved = 0.0, 0.0
    for name, value in expected.items():
        if name.startswith(part) and value.is_floating_point() and NO_GRADIENT not in name:
            difference += (state[name] - value).square().sum().item()
            moved += (value - initial[name]).square().sum().item()
    print(part, (difference / moved) ** 0.5, moved)
    assert moved > 1e-3
    return (difference / moved) ** 0.5


@pytest.mark.parametrize(("stage", "method"), CASES)
def test_student_equals_plain_pytorch(stage, method, plain, trained):
    initial, expected = plain[method]
    assert _distance(trained[stage, method], expected, initial, "student") < 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("part", ["teacher", "statistics"])
def test_teacher_and_statistics_equal_plain_pytorch(part, stage, plain, trained):
    initial, expected = plain["distcl"]
    assert _distance(trained[stage, "distcl"], expected, initial, part) < 1e-3
