"""A checkpoint of n workers and one ZeRO stage is the state of any m workers and any stage."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_format import (
    MANIFEST,
    Checkpoint,
    DamagedCheckpointError,
    check_newest,
    delete_checkpoint,
    list_checkpoints,
)
from cluster.checkpoint_weights import FILE_OF, read_buffers, read_runs, read_weights
from cluster.loss_scale import LossScale
from cluster.storage import Patience, Storage, StorageConfig
from tests.cluster.checkpoint_ranks import ENGINES, STEPS, run_rank, storage
from tests.cluster.engine_ranks import plain_pytorch
from tests.cluster.test_engine import distance
from tests.processes import run_ranks

WRITERS, READERS, STAGES, FP16 = 2, (1, 4), (0, 1, 2, 3), "1 fp16"
# Every engine by 1 worker, and every stage's next one by 1 and by 4.
CASES = [(engine, 1, engine) for engine in ENGINES]
CASES += [(str(stage), m, str((stage + 1) % 4)) for stage in STAGES for m in READERS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs written by 2 workers, one an engine."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(run_rank, WRITERS, str(folder), "train_and_save", [(name,) for name in ENGINES])
    return folder


@pytest.fixture(scope="module")
def resharded(runs) -> Path:
    """Beside them, what 1 and 4 workers restored from them, and made of it."""
    for m in READERS:
        pairs = [(to, engine) for engine, readers, to in CASES if readers == m]
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


@pytest.mark.parametrize(("engine", "workers", "to"), CASES)
def test_a_checkpoint_loads_on_other_workers_and_stages(resharded, engine, workers, to):
    written = vectors(resharded / engine)
    restored = vectors(resharded / f"{engine}-to-{workers}-{to}")
    assert written.keys() == restored.keys()
    for name, value in written.items():
        assert torch.equal(restored[name], value), name
    assert (written["exp_avg_sq"] > 0).any() and (written["teacher"] != written["student"]).any()


@pytest.mark.parametrize(("engine", "workers", "to"), [case for case in CASES if case[0] != FP16])
def test_adams_step_counts_are_restored(resharded, engine, workers, to):
    steps = checkpoint(resharded / f"{engine}-to-{workers}-{to}").optimizer_steps
    assert steps["encoder"] == STEPS
    assert steps["projection"] == STEPS - 2  # it waited for the contrast's start


def test_the_loss_scale_is_restored(resharded):
    written, restored = (checkpoint(resharded / name) for name in (FP16, f"{FP16}-to-1-{FP16}"))
    assert restored.loss_scale == written.loss_scale != asdict(LossScale())
    assert restored.optimizer_steps == written.optimizer_steps


@pytest.fixture(scope="module")
def plain() -> tuple[dict, dict]:
    torch.set_num_threads(1)
    return plain_pytorch("bankcl")


@pytest.mark.parametrize(("engine", "workers", "to"), [case for case in CASES if case[0] != FP16])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_resumed_run_ends_where_plain_pytorch_does(resharded, plain, name, engine, workers, to):
    run = storage(resharded / f"{engine}-to-{workers}-{to}")
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


@pytest.mark.parametrize("content", ["", '{"step": 5', '{"format_version": 1, "stop": 5}', "[]"])
def test_a_damaged_manifest_is_named_and_the_checkpoint_before_taken_if_asked(two, content):
    run = storage(two.parents[1])
    (two / MANIFEST).write_text(content)
    named = rf"step-0*{STEPS + 1}-1/manifest.json is damaged"
    with pytest.raises(DamagedCheckpointError, match=named):
        list_checkpoints(run)
    with pytest.raises(ValueError, match=rf"{named}.*of step {STEPS} with --fall_back true"):
        check_newest(run, fall_back=False)
    assert check_newest(run, fall_back=True).step == STEPS
    assert [found.step for found in list_checkpoints(run)] == [STEPS]
    assert not two.exists() or not list(two.iterdir())


def test_a_damaged_manifest_of_an_older_checkpoint_is_deleted_if_asked(two):
    run = storage(two.parents[1])
    (two.parent / f"step-{STEPS:08d}-1" / MANIFEST).write_text("")
    with pytest.raises(ValueError, match=rf"of step {STEPS + 1} with --fall_back true"):
        check_newest(run, fall_back=False)
    assert check_newest(run, fall_back=True).step == STEPS + 1
    assert [found.step for found in list_checkpoints(run)] == [STEPS + 1]


class VanishingStorage(Storage):
    """A training deletes a checkpoint while its manifest is being asked for."""

    def get(self, key: str) -> bytes:
        if f"step-{STEPS:08d}-" in key:
            delete_checkpoint(storage(Path(self._path)), key.rpartition("/")[0])
        return super().get(key)


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(two):
    run = VanishingStorage(two.parents[1].as_uri(), StorageConfig(), Patience())
    assert [found.step for found in list_checkpoints(run)] == [STEPS + 1]


def test_the_last_two_the_best_and_the_pinned_are_kept_and_nothing_of_the_others(tmp_path):
    scores = [50, 60, None, 70, None, 80, 10, None]
    run_ranks(run_rank, 1, str(tmp_path), "save_scores", [(scores, 2)])
    found = json.loads((tmp_path / "kept.json").read_text())
    kept = [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7], [2, 6, 7, 8]]
    assert found["kept"] == kept
    assert found["before"] == [[], *kept[:-1]], "not called before the manifest is written"
    folders = {path.parent.name for path in (tmp_path / "scores/checkpoints").rglob("*.*")}
    assert folders == {f"step-{step:08d}-1" for step in kept[-1]}
    manifests = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")
    }
    # Code that knows no pin reads all others.
    assert [name for name, fields in manifests.items() if "pinned" in fields] == ["step-00000002-1"]


def test_a_commit_that_arrives_after_its_successor_began_neither_counts_nor_deletes(tmp_path):
    run_ranks(run_rank, 1, str(tmp_path), "commit_late", [()])
    first, late, successor = json.loads((tmp_path / "late.json").read_text())
    assert first["complete"] == [400] and not first["said"]
    assert "a later start of its workers" in late["said"]
    assert late["manifests"] == 2, "it never arrived"
    assert late["complete"] == [400]
    assert successor["complete"] == [500] and not successor["said"]


def test_ranks_agree_on_where_to_go_on_who_may_write_and_the_precision(tmp_path):
    run_ranks(run_rank, 2, str(tmp_path), "start_again", [()])
    first, second = json.loads((tmp_path / "starts.json").read_text())
    assert first == second
    step, generation, alike, different, denial, refusal = first
    assert (step, generation) == (500, 2)
    assert (alike, different) == ("torch.bfloat16", "None")
    assert "access denied" in denial
    assert "was taken over by elsewhere" in refusal


def test_a_checkpoint_of_another_version_is_refused(two):
    manifest = two / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version 2, this code reads 1"):
        check_newest(storage(two.parents[1]), fall_back=True)
    assert manifest.exists()
