"""Complete checkpoints of a run: which there are, and whether they are what was written.

A checkpoint is its manifest: files of all ranks come first, then a manifest with their checksums.
No manifest, no checkpoint: a kill in the middle of a write leaves files that nothing points at.

    checkpoints/step-00000600-1/student-00000.safetensors    weights, float32: rank 0's part
    checkpoints/step-00000600-1/optimizer-00000.safetensors  Adam moments
    checkpoints/step-00000600-1/teacher-00000.safetensors
    checkpoints/step-00000600-1/buffers.safetensors          batch-norm buffers, class statistics
    checkpoints/step-00000600-1/manifest.json                written last

The last number of the folder is the generation of the writer's lease: a writer that lost its run
and does not know it yet cannot overwrite its successor's files. A part is a list of runs of the
vector of all parameters (see `cluster.partitions`); the manifest says which. The values are read
by `cluster.checkpoint_weights`.
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import xxhash

from cluster.storage import MissingObjectError, Storage

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
WRITTEN = re.compile(rf"{FOLDER}/step-\d+-\d+/[^/]+")
FORMAT_VERSION = 1
READERS = 4  # files read at once


class DamagedCheckpointError(ValueError):
    """A file of a complete checkpoint is missing or not what was written; one line names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its manifest describes it.

    `runs` gives, for a file, the (start, number) of the elements that it holds, in its order.
    """

    step: int  # optimiser steps done
    generation: int
    world_size: int
    zero_stage: int
    shapes: dict[str, list[int]]  # of the parameters, by name, in the order of the vectors
    optimizer_steps: dict[str, int]  # by group name
    loss_scale: dict[str, float] = field(default_factory=dict)  # under fp16
    metrics: dict[str, float] = field(default_factory=dict)  # of the validation at this step
    files: dict[str, str] = field(default_factory=dict)  # name -> xxh3-64 of the content
    runs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def prefix(self) -> str:
        return f"{FOLDER}/step-{self.step:08d}-{self.generation}"


def list_checkpoints(storage: Storage) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first."""
    manifests = [key for key in storage.list(FOLDER) if key.endswith(f"/{MANIFEST}")]
    found = [_parse(storage, key) for key in manifests]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.generation))


def _parse(storage: Storage, key: str) -> Checkpoint:
    fields = json.loads(storage.get(key))
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{storage.url}/{key} has format_version {version}, this code reads {FORMAT_VERSION}: "
            "use the release that wrote it, or start another --run"
        )
    return Checkpoint(**fields)


def delete_incomplete(storage: Storage) -> None:
    """Remove what interrupted writes and deletions left. For the run's only writer."""
    complete = {f"{checkpoint.prefix}/" for checkpoint in list_checkpoints(storage)}
    for key in storage.list(FOLDER):
        if not any(key.startswith(prefix) for prefix in complete):
            storage.delete(key)
    storage.delete_unfinished(WRITTEN)


def delete_checkpoint(storage: Storage, checkpoint: Checkpoint) -> None:
    """The manifest goes first: what is left of an interrupted deletion is no checkpoint."""
    storage.delete(f"{checkpoint.prefix}/{MANIFEST}")
    for name in checkpoint.files:
        storage.delete(f"{checkpoint.prefix}/{name}")


def check_newest(storage: Storage, *, fall_back: bool) -> Checkpoint | None:
    """The newest checkpoint, each of its files read and compared; None where there is none.

    With `fall_back` one that is damaged is deleted and the one before is taken, if there is one.
    Raises DamagedCheckpointError. For the run's only writer.
    """
    complete = list_checkpoints(storage)
    while complete:
        newest = complete.pop()
        try:
            with ThreadPoolExecutor(READERS) as pool:
                for _ in pool.map(partial(read_content, storage, newest), newest.files):
                    pass
        except DamagedCheckpointError as error:
            if not complete:
                raise DamagedCheckpointError(f"{error}; there is none before it") from None
            before = f"the checkpoint of step {complete[-1].step}"
            if not fall_back:
                raise DamagedCheckpointError(
                    f"{error}: restore it, or continue from {before} with --fall_back true"
                ) from None
            print(f"{error}: deleted, continuing from {before}", file=sys.stderr, flush=True)
            delete_checkpoint(storage, newest)
        else:
            return newest
    return None


def read_content(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    """A file's bytes; DamagedCheckpointError names it when it is missing or damaged."""
    key = f"{checkpoint.prefix}/{name}"
    try:
        content = storage.get(key)
    except MissingObjectError:
        raise DamagedCheckpointError(f"{storage.url}/{key} is missing") from None
    if xxhash.xxh3_64_hexdigest(content) != checkpoint.files[name]:
        raise DamagedCheckpointError(
            f"{storage.url}/{key} is damaged: its checksum is not the manifest's"
        )
    return content
