"""The configuration that a run was started with: what a continuation and a fork may change of it.

A continuation may change where and how long a run computes, not what. A fork begins a new run from
another run's checkpoint: it may besides change what has no effect before the contrast's start, so
that a fork from a checkpoint of that step is the run that would have been trained from its
beginning, up to rounding. From a later checkpoint it is a run that changes these in its middle.
"""

import json
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from cluster.checkpoint_format import FOLDER, Checkpoint, check_files, list_checkpoints
from cluster.config import TrainConfig
from cluster.manifest import read_manifest
from cluster.storage import Storage, StorageConfig, StorageError, open_storage
from sepico.taxonomies import Taxonomy

CONFIG, METRICS = "config.json", "metrics.jsonl"
WEIGHTS = "model.encoder_weights"
CHANGEABLE = {
    "run", "runs", "workers", "cpus_per_worker", "placement_timeout", "max_failures",
    "hang_timeout", "log_every", "checkpoint_every", "keep_last", "keep_best", "fall_back",
    "panel_every", "profile", "storage", "validation", "data.cache", "data.cache_bytes",
    "data.threads", "data.prefetch", "engine.zero_stage", "engine.offload_optimizer",
    "engine.deepspeed", "taxonomy",
}  # fmt: skip
# Statistics and banks are kept from step 0 on, what is made of them counts from the start. The
# teacher's threshold, for one, weighs the mix from step 0 on and is not among these.
FORKABLE = {
    "method", "contrast.temperature", "contrast.weight", "contrast.regularizer_weight",
    "contrast.stage_weights", "contrast.bank_length",
}  # fmt: skip


def load_config(run: Storage) -> dict[str, Any]:
    """The resolved configuration a run was started with."""
    if not run.exists(CONFIG):
        raise StorageError(f"no run at {run.url}: give the name or URL of one that was trained")
    return json.loads(run.get(CONFIG))


def described(config: TrainConfig) -> dict[str, Any]:
    """What a run's config.json says: the configuration, and the classes of its data.

    A continuation is held to their names alone; runs of older versions have no "taxonomy".
    """
    taxonomy = read_manifest(open_storage(config.data.source, config.storage)).taxonomy
    classes = {"classes": taxonomy.names, "taxonomy": taxonomy.to_dict()}
    return json.loads(json.dumps(asdict(config) | classes))


def trained_taxonomy(trained: dict[str, Any], storage: StorageConfig) -> Taxonomy:
    """The classes of a run with this config.json; where it is an older one, by the run's data."""
    if "taxonomy" in trained:
        return Taxonomy.from_dict(trained["taxonomy"])
    return read_manifest(open_storage(trained["data"]["source"], storage)).taxonomy


def check_continuation(run: Storage, wanted: dict[str, Any]) -> None:
    """Refuse to continue a run with a configuration that contradicts its own."""
    if not run.exists(CONFIG):
        return
    for key, (old, new) in contradictions(load_config(run), wanted, CHANGEABLE).items():
        raise ValueError(
            f"run {run.url} was started with {key} = {old!r}, now it is {new!r}: "
            "keep the value or give another --run"
        )


def check_fork(config: TrainConfig, wanted: dict[str, Any]) -> None:
    """Raise ValueError unless `config.fork` is a checkpoint that this run may begin from."""
    run, checkpoint = find_checkpoint(config)
    parent = load_config(run)
    changed = contradictions(parent, wanted, CHANGEABLE | FORKABLE | {"fork"})
    for key, (old, new) in changed.items():
        raise ValueError(
            f"fork {config.fork} was trained with {key} = {old!r}, this run has {new!r}, and it "
            f"acts before the contrast's start: of a fork only {', '.join(sorted(FORKABLE))} "
            "may differ"
        )
    methods = {parent["method"], config.method}
    if len(methods) == 2 and "source_only" in methods:
        raise ValueError(f"fork {config.fork}: source_only has no teacher to go on with or without")
    kept = parent["contrast"]["bank_length"] if parent["method"] == "bankcl" else 0
    if config.method == "bankcl" and config.contrast.bank_length > kept:
        raise ValueError(
            f"fork {config.fork} keeps a bank of {kept}, contrast.bank_length is "
            f"{config.contrast.bank_length}: a fork can only cut it"
        )
    check_files(run, checkpoint)


def find_checkpoint(config: TrainConfig) -> tuple[Storage, Checkpoint]:
    """The run and the checkpoint that `config.fork` names: `RUN/checkpoints/step-...`."""
    url, _, name = config.fork.rstrip("/").rpartition(f"/{FOLDER}/")
    run = open_storage(url or config.fork, config.storage)
    for checkpoint in list_checkpoints(run):
        if checkpoint.prefix == f"{FOLDER}/{name}":
            return run, checkpoint
    raise StorageError(
        f"fork {config.fork}: no such checkpoint, give the URL of a complete one, "
        f"RUN/{FOLDER}/step-..."
    )


def prefix_digest(config: TrainConfig) -> str:
    """Equal for runs that compute the same thing before the contrast's start."""
    kept = differences({}, asdict(config), CHANGEABLE | FORKABLE | {"fork"})
    return xxhash.xxh3_64_hexdigest(json.dumps(kept, sort_keys=True).encode())


def contradictions(
    old: dict[str, Any], new: dict[str, Any], changeable: Set[str]
) -> dict[str, tuple[Any, Any]]:
    """`differences` that count: a file of weights may lie in another folder, as that of a job that
    is submitted again does."""
    found = differences(old, new, changeable)
    paths = found.get(WEIGHTS, ())
    if all(paths) and len({Path(path).name for path in paths}) == 1:
        del found[WEIGHTS]
    return found


def differences(
    old: Any, new: Any, ignored: Set[str], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """What differs between two nested configurations: old and new value by dotted key."""
    if isinstance(new, dict) and isinstance(old, dict | None):
        old = old or {}
        found = {}
        for key in [*old, *(key for key in new if key not in old)]:
            name = f"{prefix}.{key}".strip(".")
            if name not in ignored:
                found |= differences(old.get(key), new.get(key), ignored, name)
        return found
    return {} if old == new else {prefix: (old, new)}
