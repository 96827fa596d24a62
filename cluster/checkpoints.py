"""Save and restore the state of a run on all its workers; the format is `checkpoint_format`'s.

Every rank stores its own part, so the files grow with the number of workers and not the time.
A step waits only for the copy of this part to host memory: a thread writes the files and, on
rank 0, the manifest.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import save
from torch import Tensor, nn

from cluster.checkpoint_format import (
    MANIFEST,
    Checkpoint,
    delete_checkpoint,
    list_checkpoints,
)
from cluster.checkpoint_weights import FILE_OF, read_buffers, read_runs
from cluster.engine import Engine
from cluster.lease import Lease
from cluster.loss_scale import LossScale
from cluster.partitions import (
    OptimizerPartition,
    Piece,
    load_weights,
    parameter_shapes,
    weights_to_store,
)
from cluster.storage import Storage
from sepico.contrast import PixelContrast
from sepico.teacher import Teacher

# Of the metrics of a validation, the one that the best checkpoints are chosen by.
BEST_BY = "student_miou"


@dataclass(frozen=True)
class RunState:
    """All that a resume needs; `teacher` and `contrast` are None for source_only."""

    engine: Engine
    teacher: Teacher | None
    contrast: PixelContrast | None

    def networks(self) -> dict[str, nn.Module]:
        networks = {"student": self.engine.module.module}
        return networks | ({"teacher": self.teacher.network} if self.teacher else {})


class CheckpointWriter:
    """Writes checkpoints behind the training's back, one at a time. Built by all ranks together.

    Keeps the newest `keep_last`, the `keep_best` with the highest mIoU of the student, and what is
    pinned. Manifests say `origin`: fields of Checkpoint. Rank 0 calls, from another thread,
    `before_commit` when all but the manifest is written, and `committed` once one is complete.
    """

    def __init__(
        self,
        storage: Storage,
        lease: Lease,
        keep_last: int,
        keep_best: int,
        origin: dict[str, Any] | None = None,
        before_commit: Callable[[], None] = lambda: None,
        committed: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        self._storage, self._lease = storage, lease
        self._keep_last, self._keep_best = keep_last, keep_best
        self._origin = origin or {}
        self._before_commit, self._committed = before_commit, committed
        # The thread's own group: its calls must not meet the training's.
        self._group = dist.new_group(backend="gloo")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, step: int, state: RunState, metrics: dict[str, float], *, pinned: bool = False
    ) -> None:
        """Copy the state after `step` steps and write it meanwhile. A collective.

        Waits for the checkpoint before, and raises what `wait` does.
        """
        self.wait()
        files, runs = _parts(state)
        checkpoint = Checkpoint(
            step=step,
            generation=self._lease.generation,
            world_size=dist.get_world_size(),
            zero_stage=state.engine.stage,
            pinned=pinned,
            shapes=parameter_shapes(state.engine.module.module),
            optimizer_steps=OptimizerPartition(state.engine.module, state.engine.stage).steps(),
            loss_scale=asdict(state.engine.loss_scale) if state.engine.loss_scale else {},
            metrics=metrics,
            runs=runs,
            **self._origin,
        )
        self._pending = self._pool.submit(self._write, checkpoint, files)

    def poll(self) -> None:
        """Raise, without waiting, if the write under way has failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once this rank's part is written and, on rank 0, the checkpoint is committed.

        Raises StorageError, and LeaseError on rank 0 if another writer took the run over; then no
        checkpoint was deleted for this one.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint, files: dict[str, dict[str, Tensor]]) -> None:
        checksums = {}
        for name in list(files):
            content = save(files.pop(name))  # popped: the copies go as they are written
            self._storage.put(f"{checkpoint.prefix}/{name}", content)
            checksums[name] = xxhash.xxh3_64_hexdigest(content)
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (checksums, checkpoint.runs), group=self._group)
        if dist.get_rank() == 0:
            for written, runs in shares:
                checkpoint.files.update(written)
                checkpoint.runs.update(runs)
            self._commit(checkpoint)

    def _commit(self, checkpoint: Checkpoint) -> None:
        self._before_commit()
        self._lease.renew(self._storage)
        fields = asdict(checkpoint)
        if not checkpoint.pinned:
            del fields["pinned"]  # code of before it can go on with the run
        manifest = json.dumps(fields).encode()
        self._storage.put(f"{checkpoint.prefix}/{MANIFEST}", manifest)
        # A put can take longer than the lease. Then a successor has cleared away this checkpoint's
        # files, and what would be deleted for it may be all that the successor has.
        self._lease.check(self._storage)
        self._committed(checkpoint)
        complete = list_checkpoints(self._storage)
        measured = [known for known in complete if BEST_BY in known.metrics]
        measured.sort(key=lambda known: known.metrics[BEST_BY], reverse=True)
        kept = {known.prefix for known in complete[-self._keep_last :]}
        kept |= {known.prefix for known in measured[: self._keep_best]}
        kept |= {known.prefix for known in complete if known.pinned}
        for known in complete:
            if known.prefix not in kept:
                delete_checkpoint(self._storage, known.prefix)


def _parts(state: RunState) -> tuple[dict[str, dict[str, Tensor]], dict[str, list]]:
    """This rank's files, as copies in host memory, and the runs that they hold."""
    engine = state.engine
    pieces = {name: weights_to_store(network, name) for name, network in state.networks().items()}
    pieces["optimizer"] = OptimizerPartition(engine.module, engine.stage).moments_to_store()
    files, runs = {}, {}
    for part, found in pieces.items():
        name = f"{part}-{dist.get_rank():05d}.safetensors"
        runs[name] = _joined([piece.run for piece in found])
        vectors = [vector for vector, file in FILE_OF.items() if file == part]
        files[name] = {vector: _host_copy(found, vector) for vector in vectors}
    if dist.get_rank() == 0:
        buffers = {
            f"{name}.{key}": value
            for name, network in state.networks().items()
            for key, value in _buffers(network).items()
        }
        if state.contrast is not None:
            tensors = state.contrast.state_dict()
            buffers |= {f"statistics.{key}": value for key, value in tensors.items()}
        files["buffers.safetensors"] = {
            key: value.detach().cpu().clone() for key, value in buffers.items()
        }
    return files, runs


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Those that are part of a network's state, such as batch-norm's; views."""
    weights = dict(network.named_parameters())
    return {key: value for key, value in network.state_dict().items() if key not in weights}


def _host_copy(pieces: list[Piece], vector: str) -> Tensor:
    copy = torch.empty(sum(piece.run[1] for piece in pieces))
    for piece, part in zip(pieces, copy.split([piece.run[1] for piece in pieces]), strict=True):
        part.copy_(piece.views[vector])
    return copy


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same elements in the same order, runs that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        elif count:
            joined.append((start, count))
    return joined


def restore_checkpoint(storage: Storage, checkpoint: Checkpoint, state: RunState) -> int:
    """Load a checkpoint of any number of workers and any ZeRO stage; returns the steps done.

    Raises ValueError, in one line, if it is of another network, or a file is missing or damaged.
    """
    shapes = parameter_shapes(state.engine.module.module)
    if list(shapes.items()) != list(checkpoint.shapes.items()):
        names = [*shapes, *checkpoint.shapes]
        first = next((n for n in names if shapes.get(n) != checkpoint.shapes.get(n)), "their order")
        raise ValueError(
            f"{storage.url}/{checkpoint.prefix} is of another network, which differs in {first}: "
            "start another --run"
        )
    read = partial(read_runs, storage, checkpoint)
    for name, network in state.networks().items():
        load_weights(network, name, read)
        buffers = read_buffers(storage, checkpoint, name)
        for key, value in _buffers(network).items():
            value.copy_(buffers[key])
    OptimizerPartition(state.engine.module, state.engine.stage).load(
        checkpoint.optimizer_steps, read
    )
    if state.engine.loss_scale:
        state.engine.loss_scale = LossScale(**checkpoint.loss_scale)
    if state.contrast is not None:
        state.contrast.load_state_dict(read_buffers(storage, checkpoint, "statistics"))
    return checkpoint.step
