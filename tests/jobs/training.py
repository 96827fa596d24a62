"""What the tests of jobs share: a tiny configuration, how a job is run, what a run left."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.checkpoint_weights import read_buffers, read_weights
from cluster.storage import Storage, StorageConfig, open_storage
from tests.processes import run_module

STEPS = 6
TINY = {
    "model.encoder": "tu-test_efficientnet",
    "model.encoder_weights": "null",
    "model.head_channels": "16",
    "model.head_dilations": "[1]",
    "model.projection_channels": "16",
    "model.dropout": "0",  # draws per rank
    "contrast.start": "2",
    "contrast.temperature": "0.5",
    "teacher.ignore_top": "0",
    "teacher.ignore_bottom": "0",
    "teacher.threshold": "0.3",
    "data.crop_height": "32",
    "data.crop_width": "64",
    "data.rcs_min_pixels": "50",
    "data.threads": "1",
    "optimization.iterations": str(STEPS),
    "optimization.global_batch": "4",
    "optimization.reference_batch": "4",
    "optimization.warmup": "0",
    "engine.precision": "fp32",
    "validation.every": "3",
    "checkpoint_every": "3",
    "panel_every": "3",
    "log_every": "1",
    "workers": "2",
    "cpus_per_worker": "1",
}


def command(module: str, options: dict[str, str]) -> list[str]:
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", module, *flags]


def run_job(module: str, options: dict[str, str]) -> subprocess.CompletedProcess:
    return run_module(module, command(module, options)[3:])


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["source_ce"], line["mix_ce"]) for line in lines if "mix_ce" in line]


def final_weights(run: Path | Storage, name: str = "student") -> dict[str, torch.Tensor]:
    storage = run if isinstance(run, Storage) else open_storage(str(run), StorageConfig())
    read = read_buffers if name == "statistics" else read_weights
    return read(storage, list_checkpoints(storage)[-1], name)
