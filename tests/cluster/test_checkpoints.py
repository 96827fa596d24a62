"""A checkpoint of n workers and one ZeRO stage is the state of any m workers and any stage."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_format import MANIFEST, Checkpoint, check_newest, list_checkpoints
from cluster.checkpoint_weights import FILE_OF, read_buffers, read_runs, read_weights
from tests.cluster.checkpoint_ranks import STEPS, run_rank, storage
from tests.cluster.engine_ranks import plain_pytorch
from tests.cluster.test_engine import distance
from tests.processes import run_ranks

WRITERS, READERS, STAGES = 2, (1, 4), (0, 1, 2, 3)
# Every stage by 1 worker, and the next stage by 1 and by 4.
CASES = [(stage, 1, stage) for stage in STAGES]
CASES += [(stage, m, (stage + 1) % 4) for stage in STAGES for m in READERS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs written by 2 workers, one a ZeRO stage."""
    folder = tmp_path_factory.mktemp("checkpoints")
    stages = [(stage,) for stage in STAGES]
    run_ranks(run_rank, WRITERS, str(folder), "train_and_save", stages)
    return folder


@pytest.fixture(scope="module")
def resharded(runs) -> Path:
    """Beside them, what 1 and 4 workers restored from them, and made of it."""
    for m in READERS:
        pairs = [(to, stage) for stage, readers, to in CASES if readers == m]
        run_ranks(run_rank, m, str(runs), "resume", pairs)
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


@pytest.fixture
def two(runs, tmp_path) -> Path:
    """A run with the checkpoint of step STEPS and a copy of it, of the step after."""
    run = shutil.copytree(runs / "1", tmp_path / "run")
    older = checkpoint(run)
    newer = replace(older, step=STEPS + 1)
    shutil.copytree(run / older.prefix, run / newer.prefix)
    (run / newer.prefix / MANIFEST).write_text(json.dumps(asdict(newer)))
    return run / newer.prefix


def flip_a_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(("spoil", "what"), [(flip_a_bit, "damaged"), (Path.unlink, "missing")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken_if_asked(two, spoil, what, capsys):
    run = storage(two.parents[1])
    assert check_newest(run, fall_back=False).step == STEPS + 1
    spoil(two / "student-00001.safetensors")
    named = rf"step-0*{STEPS + 1}-1/student-00001.safetensors is {what}"
    with pytest.raises(ValueError, match=rf"{named}.*of step {STEPS} with --fall_back true"):
        check_newest(run, fall_back=False)
    assert len(list_checkpoints(run)) == 2

    assert check_newest(run, fall_back=True).step == STEPS
    assert re.search(named, capsys.readouterr().err)
    assert [found.step for found in list_checkpoints(run)] == [STEPS]

    spoil(two.parent / f"step-{STEPS:08d}-1/teacher-00000.safetensors")
    with pytest.raises(ValueError, match=r"teacher-00000.*there is none before it"):
        check_newest(run, fall_back=True)
    assert [found.step for found in list_checkpoints(run)] == [STEPS]


def test_a_checkpoint_of_another_version_is_refused(two):
    manifest = two / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version 2, this code reads 1"):
        check_newest(storage(two.parents[1]), fall_back=True)
    assert manifest.exists()
