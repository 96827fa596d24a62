"""The start of a group of workers: by which right it writes, where it goes on, how it computes.

Processes of the group before may still live, and commit. So rank 0 fences them first, and chooses
for all: ranks that looked for themselves could go on from different checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.checkpoint_format import Checkpoint, delete_incomplete, list_checkpoints
from cluster.config import TrainConfig
from cluster.engine import autocast_dtype
from cluster.lease import Lease, LeaseError
from cluster.run_config import find_checkpoint
from cluster.storage import Storage


@dataclass(frozen=True)
class Start:
    """The same on all ranks. `checkpoint` is None at the beginning of a run that is no fork."""

    lease: Lease
    checkpoint: Checkpoint | None
    url: str  # of the run that the checkpoint is of


def agree_on_start(config: TrainConfig, run: Storage, lease: Lease) -> Start:
    """Fence the groups before, clear up after them, and choose where to go on. A collective.

    `lease` is the driver's. Raises LeaseError, on all ranks, where the run has another writer.
    """
    dist.barrier()  # a rank 0 that was held up until its group was gone must not fence the next one
    chosen: list[Start | LeaseError | None] = [None]
    if dist.get_rank() == 0:
        try:
            chosen = [_begin(config, run, lease)]
        except LeaseError as error:
            chosen = [error]
    dist.broadcast_object_list(chosen)
    (start,) = chosen
    if isinstance(start, LeaseError):
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
