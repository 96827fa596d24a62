"""The engine computes what plain PyTorch computes, for any ZeRO stage and number of workers."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from tests.cluster.engine_ranks import MISTAKES, plain_pytorch, run_rank
from tests.processes import run_ranks

VARIANTS = (
    "bankcl", "protocl", "distcl per stage", "distcl masked", "distcl day-night", "distcl micro"
)  # fmt: skip
METHODS = ("distcl", *VARIANTS, "distcl mit", "source_only")
STAGES = (0, 1, 2, 3)
# What changes where and when something is computed, and not what.
SAME_AS_DISTCL = ("distcl offload", "distcl checkpointed")
HALF = ("distcl bf16", "distcl fp16")
CASE = ("workers", "stage", "method")
CASES = [
    *[(workers, stage, "distcl") for workers in (1, 2) for stage in STAGES],
    *[(2, 1, method) for method in (*VARIANTS, "source_only")],
    *[(2, 1, "distcl offload"), (2, 3, "distcl checkpointed"), (2, 3, "distcl mit")],
    *[(1, 1, "distcl bf16"), (2, 3, "distcl fp16")],
]
# The larger matrix: every method under every stage, by 1, 2 and 4 workers.
MATRIX = [
    (workers, stage, method)
    for workers in (1, 2, 4)
    for stage in STAGES
    for method in (*METHODS, *HALF, *(SAME_AS_DISTCL if stage else ()))
]
# A constant added before a batch-norm is removed by it, one added to all keys by the softmax: these
# gradients are round-off, which Adam turns into full steps.
NO_GRADIENT = ("head.embeddings", "kv.bias")


def cases(*without: str):
    """Parameters of a test: the default cases, and those of the matrix marked slow.

    Of several workers in half precision only `rounded` is asked.
    """
    return _marked(
        case for case in MATRIX if case[2] not in without and (case[0] == 1 or case[2] not in HALF)
    )


def rounded():
    """Parameters of a test: several workers in half precision."""
    return _marked(case for case in MATRIX if case[0] > 1 and case[2] in HALF)


def _marked(chosen: Iterable[tuple]):
    marks = ((case, () if case in CASES else pytest.mark.slow) for case in chosen)
    return pytest.mark.parametrize(CASE, [pytest.param(*case, marks=mark) for case, mark in marks])


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[dict, dict]]:
    """`plain(method)`: initial and final state of plain PyTorch."""
    torch.set_num_threads(1)
    run = cache(plain_pytorch)
    return lambda method: run("distcl" if method in SAME_AS_DISTCL else method)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> Callable[[int, int, str], dict]:
    """`trained(workers, stage, method)`: a final state; processes train all that is asked for."""
    folder = tmp_path_factory.mktemp("engine")
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {tuple(map(spec.params.get, CASE)) for spec in parameters if spec is not None}

    def state(*case: Any) -> dict:
        file = folder / "{}-{}-{}.pt".format(*case)
        if not file.exists():
            chosen = [c[1:] for c in MATRIX if c[0] == case[0] and (c in selected or c == case)]
            run_ranks(run_rank, case[0], str(folder), chosen)
        return torch.load(file)

    return state


def distance(state: dict, expected: dict, initial: dict, kind: str) -> float:
    """|theta - expected| / |expected - theta_0| over the tensors of one kind."""
    difference, moved = 0.0, 0.0
    for name, value in expected.items():
        if name.startswith(kind) and not any(part in name for part in NO_GRADIENT):
            difference += (state[name] - value).double().square().sum().item()
            moved += (value - initial[name]).double().square().sum().item()
    assert moved > 1e-4
    return (difference / moved) ** 0.5


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> dict:
    """3 workers that share a batch of 4."""
    folder = tmp_path_factory.mktemp("uneven")
    run_ranks(run_rank, 3, str(folder), [(1, "distcl")])
    return torch.load(folder / "3-1-distcl.pt")


def assert_gradients_equal(found: dict, expected: dict, tolerance: float) -> None:
    for part in ("encoder", "head", "projection"):
        names = [name for name in expected if name.startswith(f"gradient {part}")]
        largest = max((expected[name].abs().max().item() for name in names), default=0.0)
        for name in names:
            gap = (found[name] - expected[name]).abs().max().item()
            assert gap <= tolerance * largest, name


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory) -> dict[str, dict]:
    """2 workers with a planted mistake."""
    folder = tmp_path_factory.mktemp("mistaken")
    run_ranks(run_rank, 2, str(folder), [(1, f"distcl {mistake}") for mistake in MISTAKES])
    return {mistake: torch.load(folder / f"2-1-distcl {mistake}.pt") for mistake in MISTAKES}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(mistake, plain, mistaken):
    initial, expected = plain("distcl")
    state = mistaken[mistake]
    if mistake == "unpaused projection":  # moves before the contrast gives it a gradient
        assert distance(state, expected, initial, "student weight projection") > 1e-2
    else:
        with pytest.raises(AssertionError, match="gradient"):
            assert_gradients_equal(state, expected, 1e-3)


@cases()
def test_gradients_equal_those_of_plain_pytorch(workers, stage, method, plain, trained):
    """Of the first step, with contrast from the start, before the optimiser moves."""
    _, expected = plain(method)
    # Masked blocks leave channels that hardly vary: float32 normalises them to 1e-5.
    tolerance = 1e-4 if method == "distcl masked" else 1e-5
    assert_gradients_equal(trained(workers, stage, method), expected, tolerance)


@rounded()
def test_workers_in_half_precision_are_as_near_to_float32_as_plain_pytorch(
    workers, stage, method, plain, trained
):
    """Their gradients are sums of rounded ones, which are other ones than the whole batch's."""
    _, exact = plain("distcl")

    def error(found: dict) -> float:
        names = [name for name in exact if name.startswith("gradient")]
        return sum((found[name] - exact[name]).double().square().sum().item() for name in names)

    assert 0 < error(trained(workers, stage, method)) < 2 * error(plain(method)[1])


def test_workers_with_uneven_shares_equal_plain_pytorch(plain, uneven):
    initial, expected = plain("distcl")
    assert_gradients_equal(uneven, expected, 1e-5)
    for kind in ("student weight", "student buffer", "teacher weight", "statistics.0.mean"):
        assert distance(uneven, expected, initial, kind) < 1e-3


@cases("distcl masked")  # most of a masked crop is one colour: gradients that cancel are round-off
def test_student_equals_plain_pytorch(workers, stage, method, plain, trained):
    initial, expected = plain(method)
    assert distance(trained(workers, stage, method), expected, initial, "student weight") < 1e-3


@cases("source_only", "distcl masked")
@pytest.mark.parametrize("kind", ["teacher weight", "statistics.0.mean", "statistics.0.variance"])
def test_teacher_and_statistics_equal_plain_pytorch(kind, workers, stage, method, plain, trained):
    initial, expected = plain(method)
    assert distance(trained(workers, stage, method), expected, initial, kind) < 1e-3


@cases("source_only", "distcl micro")  # which has no teacher; whose batch-norm is frozen
@pytest.mark.parametrize("kind", ["student buffer", "teacher buffer"])
def test_running_statistics_equal_plain_pytorch(kind, workers, stage, method, plain, trained):
    initial, expected = plain(method)
    assert distance(trained(workers, stage, method), expected, initial, kind) < 1e-3


def test_bank_equals_plain_pytorch(plain, trained):
    initial, expected = plain("bankcl")
    assert distance(trained(2, 1, "bankcl"), expected, initial, "bank.0.rows") < 1e-3


def test_statistics_of_a_later_stage_equal_plain_pytorch(plain, trained):
    initial, expected = plain("distcl per stage")
    state = trained(2, 1, "distcl per stage")
    assert distance(state, expected, initial, "statistics.1.mean") < 1e-3


@cases("source_only")
def test_class_counts_are_exact(workers, stage, method, plain, trained):
    counts = trained(workers, stage, method)["statistics.0.count"]
    assert torch.equal(counts, plain(method)[1]["statistics.0.count"])
