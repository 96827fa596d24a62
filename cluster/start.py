"""The start of a group of workers: by which right it writes, where it goes on, with what.

Processes of the group before may still live, and commit. So rank 0 fences them first, and chooses
for all: ranks that looked for themselves could go on from different checkpoints.
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.activation_checkpointing import checkpoint_activations
from cluster.checkpoint_format import Checkpoint, delete_incomplete, list_checkpoints
from cluster.checkpoints import RunState, restore_checkpoint
from cluster.config import TrainConfig
from cluster.engine import Engine, shard_teacher
from cluster.hardware import autocast_dtype
from cluster.lease import Lease, LeaseError
from cluster.process_group import TIMEOUT
from cluster.run_config import find_checkpoint
from cluster.storage import AccessDeniedError, Storage, StorageError, open_storage
from sepico.contrast import PixelContrast
from sepico.network import build_blank, build_segmentor
from sepico.normalization import set_batch_norm
from sepico.schedule import contrast_start_step
from sepico.teacher import Teacher


@dataclass(frozen=True)
class Start:
    """The same on all ranks. `checkpoint` is None at the beginning of a run that is no fork."""

    lease: Lease
    checkpoint: Checkpoint | None
    url: str  # of the run that the checkpoint is of


def agree_on_start(config: TrainConfig, run: Storage, lease: Lease) -> Start:
    """Fence the groups before, clear up after them, and choose where to go on. A collective.

    `lease` is the driver's. Raises on all ranks LeaseError, where the run has another writer, and
    AccessDeniedError, where it may not be written.
    """
    dist.barrier()  # a rank 0 that was held up until its group was gone must not fence the next one
    chosen: list[Start | StorageError | None] = [None]
    if dist.get_rank() == 0:
        try:
            chosen = [_begin(config, run, lease)]
        except (LeaseError, AccessDeniedError) as error:
            chosen = [error]
    dist.broadcast_object_list(chosen)
    (start,) = chosen
    if isinstance(start, StorageError):
        raise start
    return start


def _begin(config: TrainConfig, run: Storage, lease: Lease) -> Start:
    lease = lease.advance(run)
    delete_incomplete(run)
    if complete := list_checkpoints(run):
        return Start(lease, complete[-1], run.url)
    if config.fork:
        parent, checkpoint = find_checkpoint(config)
        return Start(lease, checkpoint, parent.url)
    return Start(lease, None, run.url)


def agree_on_precision(precision: str) -> torch.dtype | None:
    """Dtype of the autocast that all ranks take: "auto" is none on nodes that differ. A collective.

    The gradients of a step would otherwise be of two precisions, in shares that change with the
    nodes.
    """
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, autocast_dtype(precision))
    return of_ranks[0] if len(set(of_ranks)) == 1 else None


def begin_state(config: TrainConfig, device: torch.device, start: Start) -> tuple[RunState, int]:
    """What a step changes, new or as the checkpoint has it, and the steps done. A collective."""
    adapts = config.method != "source_only"
    torch.manual_seed(config.seed)
    build = build_blank if start.checkpoint else build_segmentor
    network = build(config.model, with_projection=adapts).to(device)
    network.autocast_dtype = agree_on_precision(config.engine.precision)
    teacher, contrast = None, None
    if adapts:
        teacher = Teacher(copy.deepcopy(network))
        set_batch_norm(teacher.network, config.engine.batch_norm)
        # A group of its own keeps the statistics' asynchronous call apart from the rest.
        contrast = PixelContrast(config, device=device, group=dist.new_group(timeout=TIMEOUT))
    set_batch_norm(network, config.engine.batch_norm)
    if config.engine.activation_checkpointing:
        checkpoint_activations(network.encoder)
    engine = Engine(
        network,
        config.engine.for_workers(dist.get_world_size()),
        config.optimization,
        projection_start=contrast_start_step(config.contrast.start, config.optimization),
    )
    if teacher is not None and engine.stage == 3:
        shard_teacher(teacher)
    state = RunState(engine, teacher, contrast)
    if start.checkpoint is None:
        return state, 0
    parent = open_storage(start.url, config.storage)
    return state, restore_checkpoint(parent, start.checkpoint, state)
