"""A checkpoint of n workers and one ZeRO stage is the state of any m workers and any stage."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from cluster.checkpoint_format import (
    FILE_OF,
    Checkpoint,
    list_checkpoints,
    read_buffers,
    read_runs,
    read_weights,
)
from tests.cluster.checkpoint_ranks import STEPS, run_rank, storage
from tests.cluster.engine_ranks import plain_pytorch
from tests.cluster.test_engine import distance

WRITERS, READERS, STAGES = 2, (1, 4), (0, 1, 2, 3)
# Every stage by 1 worker, and the next stage by 1 and by 4.
CASES = [(stage, 1, stage) for stage in STAGES]
CASES += [(stage, m, (stage + 1) % 4) for stage in STAGES for m in READERS]


def spawn(world_size: int, folder: Path, task: str, stages: list[tuple]) -> None:
    torch.multiprocessing.spawn(
        run_rank, (world_size, str(folder), task, stages), nprocs=world_size
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs written by 2 workers, one a ZeRO stage."""
    folder = tmp_path_factory.mktemp("checkpoints")
    spawn(WRITERS, folder, "train_and_save", [(stage,) for stage in STAGES])
    return folder


@pytest.fixture(scope="module")
def resharded(runs) -> Path:
    """Beside them, what 1 and 4 workers restored from them, and made of it."""
    for m in READERS:
        pairs = [(to, stage) for stage, readers, to in CASES if readers == m]
        spawn(m, runs, "resume", pairs)
    return runs


def checkpoint(run: Path) -> Checkpoint:
    """After STEPS steps."""
    return next(found for found in list_checkpoints(storage(run)) if found.step == STEPS)


def vectors(run: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds: the vectors whole, buffers and statistics by name."""
    found = checkpoint(run)
    total = sum(math.prod(shape) for shape in found.shapes.values())
    state = {name: read_runs(storage(run), found, name, [(0, total)])[0] for name in FILE_OF}
    for name in ("student", "teacher", "statistics"):
        state |= {f"{name} {k}": v for k, v in read_buffers(storage(run), found, name).items()}
    return state


@pytest.mark.parametrize(("stage", "workers", "to"), CASES)
def test_a_checkpoint_loads_on_other_workers_and_stages(resharded, stage, workers, to):
    written = vectors(resharded / str(stage))
    restored = vectors(resharded / f"{stage}-to-{workers}-{to}")
    assert written.keys() == restored.keys()
    for name, value in written.items():
        assert torch.equal(restored[name], value), name
    assert (written["exp_avg_sq"] > 0).any() and (written["teacher"] != written["student"]).any()


@pytest.mark.parametrize(("stage", "workers", "to"), CASES)
def test_adams_step_counts_are_restored(resharded, stage, workers, to):
    steps = checkpoint(resharded / f"{stage}-to-{workers}-{to}").optimizer_steps
    assert steps["encoder"] == STEPS
    assert steps["projection"] == STEPS - 2  # it waited for the contrast's start


@pytest.fixture(scope="module")
def plain() -> tuple[dict, dict]:
    torch.set_num_threads(1)
    return plain_pytorch("bankcl")


@pytest.mark.parametrize(("stage", "workers", "to"), CASES)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_resumed_run_ends_where_plain_pytorch_does(resharded, plain, name, stage, workers, to):
    run = storage(resharded / f"{stage}-to-{workers}-{to}")
    weights = read_weights(run, list_checkpoints(run)[-1], name)
    initial, expected = plain
    state = {f"{name} weight {key}": value for key, value in weights.items()}
    assert distance(state, expected, initial, f"{name} weight") < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_stores_its_part(runs, stage):
    found = checkpoint(runs / str(stage))
    total = sum(math.prod(shape) for shape in found.shapes.values())
    for part in ("student", "optimizer", "teacher"):
        counts = [
            sum(count for _, count in found.runs[f"{part}-{rank:05d}.safetensors"])
            for rank in range(WRITERS)
        ]
        assert sum(counts) == total
        assert max(counts) < 0.6 * total


def test_a_damaged_file_is_named(runs):
    found = checkpoint(runs / "1")
    damaged = runs / "1" / found.prefix / "student-00001.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"student-00001.* is damaged"):
            read_weights(storage(runs / "1"), found, "student")
        damaged.unlink()
        with pytest.raises(ValueError, match=r"student-00001.*no such object"):
            read_weights(storage(runs / "1"), found, "student")
    finally:
        damaged.write_bytes(whole)
