"""Save and restore the state of a run on all its workers; the format is `checkpoint_format`'s."""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from safetensors.torch import save_file

from cluster.checkpoint_format import (
    Checkpoint,
    list_checkpoints,
    read_file,
    read_weights,
)
from cluster.engine import Engine
from cluster.lease import Lease
from cluster.storage import Storage
from sepico.contrast import PixelContrast
from sepico.teacher import Teacher

TAG = "deepspeed"


def save_checkpoint(
    storage: Storage,
    lease: Lease,
    step: int,
    engine: Engine,
    teacher: Teacher | None,
    contrast: PixelContrast | None,
    keep: int = 2,
) -> None:
    """Write the state after `step` steps and drop all but the newest `keep`. A collective.

    Raises LeaseError on rank 0, and commits nothing, if another writer took the run over.
    """
    checkpoint = Checkpoint(step, lease.generation, dist.get_world_size(), engine.stage, {})
    student = engine.state_dict()
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        root = Path(folder)
        engine.module.save_checkpoint(folder, tag=TAG, exclude_frozen_parameters=False)
        if dist.get_rank() == 0:
            save_file(student, root / "student.safetensors")
            if teacher is not None:
                averages = teacher.network.state_dict()
                averages = {name: value.cpu().contiguous() for name, value in averages.items()}
                save_file(averages, root / "teacher.safetensors")
                save_file(contrast.state_dict(), root / "statistics.safetensors")
        files = _upload(storage, root, checkpoint.prefix)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, files)
    if dist.get_rank() == 0:
        merged = {name: checksum for share in shares for name, checksum in share.items()}
        checkpoint = replace(checkpoint, files=merged)
        lease.renew(storage)
        manifest = json.dumps(asdict(checkpoint), indent=1).encode()
        storage.put(f"{checkpoint.prefix}/manifest.json", manifest)
        for old in list_checkpoints(storage)[:-keep]:
            # The manifest goes first: what is left of an interrupted deletion is no checkpoint.
            storage.delete(f"{old.prefix}/manifest.json")
            for name in old.files:
                storage.delete(f"{old.prefix}/{name}")


def _upload(storage: Storage, root: Path, prefix: str) -> dict[str, str]:
    files = {}
    for path in sorted(root.rglob("*")):
        # DeepSpeed adds a conversion script and a `latest` pointer that nothing here reads.
        if path.is_dir() or (path.parent == root and path.suffix != ".safetensors"):
            continue
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        storage.put(f"{prefix}/{name}", content)
        files[name] = xxhash.xxh3_64_hexdigest(content)
    return files


def restore_checkpoint(
    storage: Storage,
    checkpoint: Checkpoint,
    engine: Engine,
    teacher: Teacher | None,
    contrast: PixelContrast | None,
) -> int:
    """Load a checkpoint into freshly built parts; returns the number of steps done."""
    if (checkpoint.world_size, checkpoint.zero_stage) != (dist.get_world_size(), engine.stage):
        raise ValueError(
            f"{storage.url}/{checkpoint.prefix} was written by {checkpoint.world_size} workers "
            f"with engine.zero_stage {checkpoint.zero_stage}: continue with the same, "
            "or start another --run"
        )
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        # DeepSpeed reads the shared module states and this rank's optimiser shard.
        mine = (f"zero_pp_rank_{dist.get_rank()}_", "mp_rank_")
        for name in checkpoint.files:
            if name.startswith(f"{TAG}/") and Path(name).name.startswith(mine):
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_file(storage, checkpoint, name))
        engine.module.load_checkpoint(folder, tag=TAG)
    if teacher is not None:
        teacher.network.load_state_dict(read_weights(storage, checkpoint, "teacher"))
        contrast.load_state_dict(read_weights(storage, checkpoint, "statistics"))
    return checkpoint.step
