"""What test_checkpoints and test_divergence run in each of their processes."""

import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.checkpoint_format import list_checkpoints
from cluster.config import EngineConfig
from cluster.lease import Lease
from cluster.loss_scale import LossScale
from cluster.storage import Storage, StorageConfig, open_storage
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
STEPS = 4  # the contrast, and with it the projection's Adam, starts at step START


def run_rank(rank: int, world_size: int, folder: str, task: str, stages: list) -> None:
    """Call `task` of this module for each of `stages`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{task}-{world_size}", rank=rank,
        world_size=world_size,
    )  # fmt: skip
    from cluster.engine import adopt_process_group

    adopt_process_group()
    for stage in stages:
        globals()[task](Path(folder), *stage)
    dist.barrier()
    dist.destroy_process_group()


def train_and_save(folder: Path, stage: int) -> None:
    """Take STEPS steps and write run FOLDER/STAGE."""
    state = _state(stage)
    _train(state, range(STEPS))
    _save(storage(folder / str(stage)), state, STEPS)


def resume(folder: Path, stage: int, of_stage: int) -> None:
    """Restore run FOLDER/OF_STAGE under `stage`; write that, and the state after all steps."""
    from cluster.checkpoints import restore_checkpoint

    state = _state(stage)
    stored = storage(folder / str(of_stage))
    done = restore_checkpoint(stored, list_checkpoints(stored)[-1], state)
    own = storage(folder / f"{of_stage}-to-{dist.get_world_size()}-{stage}")
    _save(own, state, done)
    _train(state, range(done, ALL_STEPS))
    _save(own, state, ALL_STEPS)


def diverge(folder: Path, stage: int, precision: str = "fp32") -> None:
    """A step with an image of NaN on the last rank; rank 0 writes FOLDER/STAGE-PRECISION.txt.

    Under fp16 one before it, whose gradients overflow by their loss scale.
    """
    state = _state(stage, precision)
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


def _state(stage: int, precision: str = "fp32"):
    from cluster.checkpoints import RunState
    from cluster.engine import Engine, shard_teacher

    network, teacher, contrast = build(CONFIG, dist.new_group(), precision=precision)
    use_batch_norm(network, CONFIG)
    use_batch_norm(teacher.network, CONFIG)
    engine = Engine(
        network,
        EngineConfig(zero_stage=stage, precision=precision),
        CONFIG.optimization,
        projection_start=CONFIG.contrast.start,
    )
    if stage == 3:
        shard_teacher(teacher)
    return RunState(engine, teacher, contrast)


def _save(run: Storage, state, step: int) -> None:
    from cluster.checkpoints import CheckpointWriter

    lease = Lease(1, "test", "token")
    if dist.get_rank() == 0:
        run.put(lease.key, lease.document(0))
    writer = CheckpointWriter(run, lease, keep_last=2, keep_best=0)
    writer.save(step, state, {})
    writer.wait()
    writer.close()
    dist.barrier()


def storage(folder: Path) -> Storage:
    return open_storage(str(folder), StorageConfig())
