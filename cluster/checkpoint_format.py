"""Complete checkpoints of a run: which there are, and their verified bytes.

A checkpoint is its manifest: files of all ranks come first, then a manifest with their checksums.
No manifest, no checkpoint: a kill in the middle of a write leaves files that nothing points at.

    checkpoints/step-00000600-1/deepspeed/...            student and optimiser, per rank
    checkpoints/step-00000600-1/student.safetensors      full float32 weights and buffers
    checkpoints/step-00000600-1/teacher.safetensors
    checkpoints/step-00000600-1/statistics.safetensors
    checkpoints/step-00000600-1/manifest.json            written last

The last number is the generation of the writer's lease: a writer that lost its run and does not
know it yet cannot overwrite its successor's files.
"""

import json
from dataclasses import dataclass

import xxhash
from safetensors.torch import load
from torch import Tensor

from cluster.storage import Storage

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` optimiser steps are done, `files` maps names to checksums."""

    step: int
    generation: int
    world_size: int
    zero_stage: int
    files: dict[str, str]

    @property
    def prefix(self) -> str:
        return f"{FOLDER}/step-{self.step:08d}-{self.generation}"


def list_checkpoints(storage: Storage) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first."""
    manifests = [key for key in storage.list(FOLDER) if key.endswith("/manifest.json")]
    found = [Checkpoint(**json.loads(storage.get(key))) for key in manifests]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.generation))


def delete_incomplete(storage: Storage) -> None:
    """Remove what interrupted writes and deletions left. For the run's only writer."""
    complete = {f"{checkpoint.prefix}/" for checkpoint in list_checkpoints(storage)}
    for key in storage.list(FOLDER):
        if not any(key.startswith(prefix) for prefix in complete):
            storage.delete(key)


def read_file(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    """One file of a checkpoint; ValueError that names it when its checksum does not match."""
    key = f"{checkpoint.prefix}/{name}"
    content = storage.get(key)
    if xxhash.xxh3_64_hexdigest(content) != checkpoint.files[name]:
        raise ValueError(
            f"{storage.url}/{key} is damaged: its checksum is not the manifest's; "
            f"delete {checkpoint.prefix}/manifest.json to fall back to the checkpoint before"
        )
    return content


def read_weights(storage: Storage, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Tensors of `name`.safetensors."""
    return load(read_file(storage, checkpoint, f"{name}.safetensors"))
