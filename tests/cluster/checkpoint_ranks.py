"""What test_checkpoints and test_divergence run in each of their processes."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.checkpoint_format import (
    MANIFEST,
    Checkpoint,
    delete_incomplete,
    list_checkpoints,
)
from cluster.config import EngineConfig, TrainConfig
from cluster.lease import Lease, LeaseError
from cluster.loss_scale import LossScale
from cluster.storage import (
    AccessDeniedError,
    Patience,
    Storage,
    StorageConfig,
    StorageError,
    open_storage,
)
from sepico.schedule import ema_decay
from sepico.step import AdaptationStep
from tests.cluster.engine_ranks import (
    BATCH,
    START,
    build,
    full_state,
    global_batch,
    method_config,
    use_batch_norm,
)
from tests.cluster.engine_ranks import STEPS as ALL_STEPS

CONFIG = method_config("bankcl", START)
ENGINES = {
    **{str(stage): EngineConfig(zero_stage=stage, precision="fp32") for stage in range(4)},
    "2 offload": EngineConfig(zero_stage=2, precision="fp32", offload_optimizer=True),
    "1 fp16": EngineConfig(zero_stage=1, precision="fp16"),
}
STEPS = 4  # the contrast, and with it the projection's Adam, starts at step START


def run_rank(rank: int, world_size: int, folder: str, task: str, calls: list) -> None:
    """Call `task` of this module with the folder and each of `calls`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{task}-{world_size}", rank=rank,
        world_size=world_size,
    )  # fmt: skip
    from cluster.engine import adopt_process_group

    adopt_process_group()
    for arguments in calls:
        globals()[task](Path(folder), *arguments)
    dist.barrier()
    dist.destroy_process_group()


def train_and_save(folder: Path, engine: str) -> None:
    """Take STEPS steps under one of ENGINES and write run FOLDER/ENGINE."""
    state = _state(ENGINES[engine])
    _train(state, range(STEPS))
    _save(storage(folder / engine), state, STEPS)


def resume(folder: Path, engine: str, of: str) -> None:
    """Restore run FOLDER/OF under `engine`; write that, and the state after all steps."""
    from cluster.checkpoints import restore_checkpoint

    state = _state(ENGINES[engine])
    stored = storage(folder / of)
    done = restore_checkpoint(stored, list_checkpoints(stored)[-1], state)
    own = storage(folder / f"{of}-to-{dist.get_world_size()}-{engine}")
    _save(own, state, done)
    _train(state, range(done, ALL_STEPS))
    _save(own, state, ALL_STEPS)


def save_scores(folder: Path, scores: list[float | None], pinned: int) -> None:
    """Save after steps 1, 2, ... with a score each, one of them pinned; write those kept after
    each, and what was complete before the manifest of each, to FOLDER/kept.json."""
    from cluster.checkpoints import BEST_BY, CheckpointWriter

    run, state = storage(folder / "scores"), _state(ENGINES["0"])

    def complete() -> list[int]:
        return [found.step for found in list_checkpoints(run)]

    before, kept = [], []
    writer = CheckpointWriter(
        run, _lease(run), keep_last=2, keep_best=1, before_commit=lambda: before.append(complete())
    )
    for step, score in enumerate(scores, start=1):
        metrics = {} if score is None else {BEST_BY: score}
        writer.save(step, state, metrics, pinned=step == pinned)
        writer.wait()
        kept.append(complete())
    writer.close()
    (folder / "kept.json").write_text(json.dumps({"before": before, "kept": kept}))


class _LateStorage(Storage):
    """Something happens between the call to put a manifest and its arrival."""

    meanwhile: Callable[[], None]

    def put(self, key: str, data: bytes) -> None:
        if key.endswith(MANIFEST):
            self.meanwhile()
        super().put(key, data)


def commit_late(folder: Path) -> None:
    """A commit arrives when a later start of the workers has begun, which then commits itself."""
    from cluster.checkpoints import CheckpointWriter

    run, state = storage(folder / "late"), _state(ENGINES["0"])
    late = _LateStorage(run.url, StorageConfig(), Patience())
    first = _lease(run)

    def begin() -> None:
        first.advance(run)
        delete_incomplete(run)

    def save(store: Storage, lease: Lease, step: int) -> dict:
        writer = CheckpointWriter(store, lease, keep_last=1, keep_best=0)
        writer.save(step, state, {})
        try:
            writer.wait()
            said = ""
        except StorageError as error:
            said = str(error)
        writer.close()
        complete = [found.step for found in list_checkpoints(run)]
        manifests = [key for key in run.list() if key.endswith(MANIFEST)]
        return {"said": said, "complete": complete, "manifests": len(manifests)}

    late.meanwhile = begin
    outcomes = [save(run, first, 400), save(late, first, 600)]
    outcomes.append(save(run, first.newest(run), 500))
    (folder / "late.json").write_text(json.dumps(outcomes))


def start_again(folder: Path) -> None:
    """Where each rank goes on when the last one's storage shows a checkpoint more, in which
    precision on nodes that are alike and that differ, and what it says when rank 0 may not write
    the run, and when another writer has it; rank 0 writes FOLDER/starts.json."""
    from cluster import start as starts

    rank = dist.get_rank()
    run = storage(folder / f"start-{rank}")
    lease = _lease(run)
    for step in (500, 600)[: rank + 1]:
        checkpoint = Checkpoint(step, 1, 1, 1, {}, {})
        run.put(f"{checkpoint.prefix}/student-00000.safetensors", b"")
        run.put(f"{checkpoint.prefix}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())
    start = starts.agree_on_start(TrainConfig(), run, lease)
    found = [start.checkpoint.step, start.lease.generation]
    fast = {0: torch.bfloat16, 1: None}[rank]
    for of_nodes in (lambda _: torch.bfloat16, lambda _: fast):
        starts.autocast_dtype = of_nodes
        found.append(str(starts.agree_on_precision("auto")))

    def deny(key: str, data: bytes) -> bool:
        raise AccessDeniedError(f"{key}: access denied")

    thief = Lease(9, "elsewhere", "other token")
    for refuse in (
        lambda: setattr(run, "create", deny),
        lambda: run.put(thief.key, thief.document(0)),
    ):
        if rank == 0:
            refuse()
        try:
            starts.agree_on_start(TrainConfig(), run, lease)
        except (AccessDeniedError, LeaseError) as error:
            found.append(str(error))
    of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    if rank == 0:
        (folder / "starts.json").write_text(json.dumps(of_ranks))


def diverge(folder: Path, stage: int, precision: str = "fp32") -> None:
    """A step with an image of NaN on the last rank; rank 0 writes FOLDER/STAGE-PRECISION.txt.

    Under fp16 one before it, whose gradients overflow by their loss scale.
    """
    state = _state(EngineConfig(zero_stage=stage, precision=precision))
    if precision == "fp16":
        state.engine.loss_scale.value = 2.0**100
        said = [_step_once(state, 1, spoil=False)]
        assert state.engine.loss_scale == LossScale(2.0**99, 0)
        state.engine.loss_scale.value = 2.0**10
    else:
        said = []
    _train(state, range(1))
    said.append(_step_once(state, 1, spoil=dist.get_rank() == dist.get_world_size() - 1))
    of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, said)
    if dist.get_rank() == 0:
        lines = [line for said in of_ranks for line in said]
        (folder / f"{stage}-{precision}.txt").write_text("\n".join(lines))


def _step_once(state, step: int, *, spoil: bool) -> str:
    """What came of a step, on an image of NaN if spoilt."""
    from cluster.engine import DivergenceError

    network = state.engine.module.module
    before = full_state(network)
    terms = AdaptationStep(CONFIG, network.normalize, state.teacher, state.contrast)
    batch = global_batch(step, range(dist.get_rank(), BATCH, dist.get_world_size()))
    if spoil:
        batch.source_image[0] = math.nan
    try:
        state.engine.step(terms.terms(state.engine, batch, step), step)
        outcome = "no error"
    except DivergenceError as error:
        outcome = str(error)
    after = full_state(network)
    moved = [name for name, _ in network.named_parameters() if (after[name] != before[name]).any()]
    return f"{outcome}; moved: {moved}"


def _train(state, steps: range) -> None:
    network = state.engine.module.module
    terms = AdaptationStep(CONFIG, network.normalize, state.teacher, state.contrast)
    slots = range(dist.get_rank(), BATCH, dist.get_world_size())
    for step in steps:
        network.train()
        state.engine.step(terms.terms(state.engine, global_batch(step, slots), step), step)
        decay = ema_decay(step, CONFIG.optimization, CONFIG.teacher.ema_alpha)
        state.engine.update_teacher(state.teacher, decay)


def _state(config: EngineConfig):
    from cluster.checkpoints import RunState
    from cluster.engine import Engine, shard_teacher

    network, teacher, contrast = build(CONFIG, dist.new_group(), precision=config.precision)
    use_batch_norm(network, CONFIG)
    use_batch_norm(teacher.network, CONFIG)
    engine = Engine(
        network,
        config,
        CONFIG.optimization,
        projection_start=CONFIG.contrast.start,
    )
    if config.zero_stage == 3:
        shard_teacher(teacher)
    return RunState(engine, teacher, contrast)


def _save(run: Storage, state, step: int) -> None:
    from cluster.checkpoints import CheckpointWriter

    writer = CheckpointWriter(run, _lease(run), keep_last=2, keep_best=0)
    writer.save(step, state, {})
    writer.wait()
    writer.close()
    dist.barrier()


def _lease(run: Storage) -> Lease:
    lease = Lease(1, "test", "token")
    if dist.get_rank() == 0:
        run.put(lease.key, lease.document(0))
    return lease


def storage(folder: Path) -> Storage:
    return open_storage(str(folder), StorageConfig())
