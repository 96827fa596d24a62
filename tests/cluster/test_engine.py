"""The engine computes what plain PyTorch computes, for any ZeRO stage and number of workers."""

import pytest
import torch
import torch.multiprocessing

from tests.cluster.engine_ranks import plain_pytorch, run_rank

VARIANTS = (
    "bankcl", "protocl", "distcl per stage", "distcl masked", "distcl day-night", "distcl micro"
)  # fmt: skip
METHODS = ("distcl", *VARIANTS, "source_only")
STAGES = (0, 1, 2, 3)
# What changes where and when something is computed, and not what.
SAME_AS_DISTCL = ("distcl offload", "distcl checkpointed")
ADAPTING = [
    *[(stage, "distcl") for stage in STAGES],
    *[(1, method) for method in VARIANTS],
    *[(stage, variant) for stage in (1, 3) for variant in SAME_AS_DISTCL],
]
CASES = [*ADAPTING, (1, "source_only")]
# The larger matrix: every method under every stage, and 4 workers.
MATRIX = [
    *[(stage, method) for stage in STAGES for method in METHODS],
    *[(stage, variant) for stage in STAGES[1:] for variant in SAME_AS_DISTCL],
]
# A constant added before a batch-norm is removed by it: these gradients are round-off, which
# Adam turns into full steps.
NO_GRADIENT = "head.embeddings"


def cases(*without: str):
    """Parameters of a test: the default cases, and those of the matrix marked slow."""
    marked = [
        pytest.param(*case, marks=() if case in CASES else pytest.mark.slow)
        for case in MATRIX
        if case[1] not in without
    ]
    return pytest.mark.parametrize(("stage", "method"), marked)


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[dict, dict]]:
    torch.set_num_threads(1)
    found = {method: plain_pytorch(method) for method in METHODS}
    return found | dict.fromkeys(SAME_AS_DISTCL, found["distcl"])


@pytest.fixture(
    scope="module",
    params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
    ids=["1-worker", "2-workers", "4-workers"],
)
def trained(request, tmp_path_factory) -> dict[tuple[int, str], dict]:
    """Final states of all cases at one world size."""
    folder = tmp_path_factory.mktemp("engine")
    world_size = request.param
    chosen = CASES if "not slow" in request.config.getoption("-m") else MATRIX
    torch.multiprocessing.spawn(run_rank, (world_size, str(folder), chosen), nprocs=world_size)
    return {
        (stage, method): torch.load(folder / f"{world_size}-{stage}-{method}.pt")
        for stage, method in chosen
    }


def distance(state: dict, expected: dict, initial: dict, kind: str) -> float:
    """|theta - expected| / |expected - theta_0| over the tensors of one kind."""
    difference, moved = 0.0, 0.0
    for name, value in expected.items():
        if name.startswith(kind) and NO_GRADIENT not in name:
            difference += (state[name] - value).double().square().sum().item()
            moved += (value - initial[name]).double().square().sum().item()
    assert moved > 1e-3
    return (difference / moved) ** 0.5


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> dict:
    """3 workers that share a batch of 4."""
    folder = tmp_path_factory.mktemp("uneven")
    torch.multiprocessing.spawn(run_rank, (3, str(folder), [(1, "distcl")]), nprocs=3)
    return torch.load(folder / "3-1-distcl.pt")


def assert_gradients_equal(found: dict, expected: dict, tolerance: float) -> None:
    for part in ("encoder", "head", "projection"):
        names = [name for name in expected if name.startswith(f"gradient {part}")]
        largest = max((expected[name].abs().max().item() for name in names), default=0.0)
        for name in names:
            gap = (found[name] - expected[name]).abs().max().item()
            assert gap <= tolerance * largest, name


@cases()
def test_gradients_equal_those_of_plain_pytorch(stage, method, plain, trained):
    """Of the first step, with contrast from the start, before the optimiser moves."""
    _, expected = plain[method]
    # Masked blocks leave channels that hardly vary: float32 normalises them to 1e-5.
    tolerance = 1e-4 if method == "distcl masked" else 1e-5
    assert_gradients_equal(trained[stage, method], expected, tolerance)


def test_workers_with_uneven_shares_equal_plain_pytorch(plain, uneven):
    initial, expected = plain["distcl"]
    assert_gradients_equal(uneven, expected, 1e-5)
    for kind in ("student weight", "student buffer", "teacher weight", "statistics.0.mean"):
        assert distance(uneven, expected, initial, kind) < 1e-3


@cases()
def test_student_equals_plain_pytorch(stage, method, plain, trained):
    initial, expected = plain[method]
    assert distance(trained[stage, method], expected, initial, "student weight") < 1e-3


@cases("source_only")
@pytest.mark.parametrize("kind", ["teacher weight", "statistics.0.mean", "statistics.0.variance"])
def test_teacher_and_statistics_equal_plain_pytorch(kind, stage, method, plain, trained):
    initial, expected = plain[method]
    assert distance(trained[stage, method], expected, initial, kind) < 1e-3


@cases("source_only", "distcl micro")  # which has no teacher; whose batch-norm is frozen
@pytest.mark.parametrize("kind", ["student buffer", "teacher buffer"])
def test_running_statistics_equal_plain_pytorch(kind, stage, method, plain, trained):
    initial, expected = plain[method]
    assert distance(trained[stage, method], expected, initial, kind) < 1e-3


def test_bank_equals_plain_pytorch(plain, trained):
    initial, expected = plain["bankcl"]
    assert distance(trained[1, "bankcl"], expected, initial, "bank.0.rows") < 1e-3


def test_statistics_of_a_later_stage_equal_plain_pytorch(plain, trained):
    initial, expected = plain["distcl per stage"]
    state = trained[1, "distcl per stage"]
    assert distance(state, expected, initial, "statistics.1.mean") < 1e-3


@cases("source_only")
def test_class_counts_are_exact(stage, method, plain, trained):
    counts = trained[stage, method]["statistics.0.count"]
    assert torch.equal(counts, plain[method][1]["statistics.0.count"])
