"""Complete checkpoints of a run: which there are, and whether they are what was written.

A checkpoint is its manifest: files of all ranks come first, then a manifest with their checksums.
No manifest, no checkpoint: a kill in the middle of a write leaves files that nothing points at. A
manifest alone is none either: a writer that lost its run commits one late, when its successor has
cleared away the files that it is of.

    checkpoints/step-00000600-1/student-00000.safetensors    weights, float32: rank 0's part
    checkpoints/step-00000600-1/optimizer-00000.safetensors  Adam moments
    checkpoints/step-00000600-1/teacher-00000.safetensors
    checkpoints/step-00000600-1/buffers.safetensors          batch-norm buffers, class statistics
    checkpoints/step-00000600-1/manifest.json                written last

The last number of the folder is the generation of the lease, which every start of the workers
takes anew: one that lost its run and does not know it yet cannot overwrite its successor's files. A
part is a list of runs of the vector of all parameters (see `cluster.partitions`); the manifest says
which. The values are read by `cluster.checkpoint_weights`.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import xxhash

from cluster.storage import MissingObjectError, Storage, StorageError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
WRITTEN = re.compile(rf"{FOLDER}/step-\d+-\d+/[^/]+")
FORMAT_VERSION = 1
_MANIFEST_KEY = re.compile(rf"{FOLDER}/step-(\d+)-(\d+)/{MANIFEST}")
READERS, PIECE_BYTES = 4, 16 << 20  # files read at once, by a driver of little memory in pieces


class DamagedCheckpointError(ValueError):
    """A file of a complete checkpoint, or its manifest, is missing or not what was written; one
    line names it."""


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
    pinned: bool = False  # no later one takes its place: other runs may begin from it
    loss_scale: dict[str, float] = field(default_factory=dict)  # under fp16
    metrics: dict[str, float] = field(default_factory=dict)  # of the validation at this step
    config: dict[str, Any] = field(default_factory=dict)  # of the run, as in its config.json
    versions: dict[str, str] = field(default_factory=dict)  # of the code and its libraries
    files: dict[str, str] = field(default_factory=dict)  # name -> xxh3-64 of the content
    runs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def prefix(self) -> str:
        return f"{FOLDER}/step-{self.step:08d}-{self.generation}"


def list_checkpoints(storage: Storage, *, skip_damaged: bool = False) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first. Raises DamagedCheckpointError.

    With `skip_damaged` those without a readable manifest are left out, for `check_newest`.
    """
    found, skipped = [], (DamagedCheckpointError,) if skip_damaged else ()
    for key in complete_manifests(storage):
        with suppress(MissingObjectError, *skipped):  # a training may delete it after the listing
            found.append(_read(storage, key))
    return found


def newest_checkpoint(run: Storage) -> Checkpoint:
    """The newest complete checkpoint. Raises StorageError in one line if there is none."""
    complete = list_checkpoints(run)
    if not complete:
        raise StorageError(f"run {run.url} has no checkpoint yet: let it train to its first")
    return complete[-1]


def complete_manifests(storage: Storage) -> list[str]:
    """Keys of the manifests of complete checkpoints, oldest first."""
    keys = storage.list(FOLDER)
    files = Counter(map(_folder, keys))
    matches = [match for key in keys if (match := _MANIFEST_KEY.fullmatch(key))]
    matches.sort(key=lambda match: (int(match[1]), int(match[2])))
    return [match[0] for match in matches if files[_folder(match[0])] > 1]


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def _read(storage: Storage, key: str) -> Checkpoint:
    content = storage.get(key)
    try:
        fields = dict(json.loads(content))
        version = fields["format_version"]
        if version == FORMAT_VERSION:
            return Checkpoint(**fields)
    except (ValueError, TypeError, KeyError):
        raise DamagedCheckpointError(f"{storage.url}/{key} is damaged: it is no manifest") from None
    raise ValueError(
        f"{storage.url}/{key} has format_version {version}, this code reads {FORMAT_VERSION}: "
        "use the release that wrote it, or start another --run"
    )


def delete_incomplete(storage: Storage) -> None:
    """Remove what interrupted writes and deletions left. For the run's only writer."""
    complete = set(map(_folder, complete_manifests(storage)))
    for key in storage.list(FOLDER):
        if _folder(key) not in complete:
            storage.delete(key)
    storage.delete_unfinished(WRITTEN)


def delete_checkpoint(storage: Storage, folder: str) -> None:
    """The manifest goes first: what is left of an interrupted deletion is no checkpoint."""
    storage.delete(f"{folder}/{MANIFEST}")
    for key in storage.list(folder):
        storage.delete(key)


def check_newest(storage: Storage, *, fall_back: bool) -> Checkpoint | None:
    """The newest checkpoint, each of its files read and compared; None where there is none.

    With `fall_back` one that is damaged is deleted and the one before is taken, if there is one.
    Raises DamagedCheckpointError, for the manifests of older ones too. For the run's only writer.
    """
    newest, complete = None, complete_manifests(storage)
    for key in reversed(complete):
        try:
            checkpoint = _read(storage, key)
            if newest is None:
                check_files(storage, checkpoint)
                newest = checkpoint
        except DamagedCheckpointError as error:
            complete = [other for other in complete if other != key]
            if not complete:
                raise DamagedCheckpointError(f"{error}; there is none before it") from None
            before = f"the checkpoint of step {int(_MANIFEST_KEY.fullmatch(complete[-1])[1])}"
            if not fall_back:
                raise DamagedCheckpointError(
                    f"{error}: restore it, or continue from {before} with --fall_back true"
                ) from None
            print(f"{error}: deleted, continuing from {before}", file=sys.stderr, flush=True)
            delete_checkpoint(storage, _folder(key))
    return newest


def check_files(storage: Storage, checkpoint: Checkpoint) -> None:
    """Read all files, in pieces; DamagedCheckpointError names one that is missing or damaged."""
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(partial(_check_file, storage, checkpoint), checkpoint.files):
            pass


def _check_file(storage: Storage, checkpoint: Checkpoint, name: str) -> None:
    key, digest = f"{checkpoint.prefix}/{name}", xxhash.xxh3_64()
    with _missing_named(storage, key):
        size, _ = storage.describe(key)
        for begin in range(0, size, PIECE_BYTES):
            digest.update(storage.get_range(key, begin, min(PIECE_BYTES, size - begin)))
    _compare(storage, key, digest.hexdigest(), checkpoint.files[name])


def read_content(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    """A file's bytes; DamagedCheckpointError names it when it is missing or damaged."""
    key = f"{checkpoint.prefix}/{name}"
    with _missing_named(storage, key):
        content = storage.get(key)
    _compare(storage, key, xxhash.xxh3_64_hexdigest(content), checkpoint.files[name])
    return content


@contextmanager
def _missing_named(storage: Storage, key: str) -> Iterator[None]:
    try:
        yield
    except MissingObjectError:
        raise DamagedCheckpointError(f"{storage.url}/{key} is missing") from None


def _compare(storage: Storage, key: str, found: str, written: str) -> None:
    if found != written:
        raise DamagedCheckpointError(
            f"{storage.url}/{key} is damaged: its checksum is not the manifest's"
        )
