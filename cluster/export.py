"""From a run's checkpoint to a folder that needs neither Ray nor DeepSpeed: `sepico.exported`."""

import json
from dataclasses import dataclass, field
from typing import Literal

from safetensors.torch import save

from cluster.checkpoint_format import Checkpoint, list_checkpoints
from cluster.checkpoint_weights import read_weights
from cluster.run_config import load_config, trained_taxonomy
from cluster.storage import StorageConfig, StorageError, open_storage
from cluster.urls import run_url
from sepico.exported import DESCRIPTION, WEIGHTS


@dataclass
class ExportConfig:
    """Writes the consolidated weights of a run's checkpoint, with the model's configuration.

    Attributes:
        run: Name (a folder below `runs`) or URL of the run.
        to: Where the network goes: a folder or a URL.
        runs: URL of the folder that holds runs given by name.
        network: The student, or the teacher that averages it.
        step: Which checkpoint, by the steps it has done; default: the newest.
    """

    run: str
    to: str
    runs: str = "runs"
    network: Literal["student", "teacher"] = "student"
    step: int | None = None
    storage: StorageConfig = field(default_factory=StorageConfig)


def export(config: ExportConfig) -> Checkpoint:
    """Write model.safetensors, then config.json. Raises ValueError in one line."""
    run = open_storage(run_url(config.run, config.runs), config.storage)
    run.check()
    trained = load_config(run)
    checkpoint = _pick(run.url, list_checkpoints(run), config.step)
    if f"{config.network}-00000.safetensors" not in checkpoint.files:
        raise StorageError(f"run {run.url} has no {config.network}: export its student")
    to = open_storage(config.to, config.storage)
    to.check()
    weights = read_weights(run, checkpoint, config.network)
    weights = {name: v for name, v in weights.items() if not name.startswith("projection.")}
    description = {
        "model": {**trained["model"], "encoder_weights": None},
        "taxonomy": trained_taxonomy(trained, config.storage).to_dict(),
        "origin": {"run": run.url, "step": checkpoint.step, "network": config.network},
    }
    to.put(WEIGHTS, save(weights))
    to.put(DESCRIPTION, json.dumps(description, indent=1).encode())
    return checkpoint


def _pick(url: str, complete: list[Checkpoint], step: int | None) -> Checkpoint:
    found = [checkpoint for checkpoint in complete if step in (None, checkpoint.step)]
    if not found:
        steps = ", ".join(str(checkpoint.step) for checkpoint in complete) or "none"
        which = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
        raise StorageError(f"run {url} has {which}; complete are: {steps}")
    return found[-1]
