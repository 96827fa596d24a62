"""A trained network in a folder: weights as safetensors, configuration and classes as JSON.

from sepico.exported import load

network = load("exported/")  # a Segmentor in eval mode, without projection head
logits, _ = network(network.normalize(image))  # (1, 3, H, W) float32 on the 0..1 scale
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from sepico.config import ModelConfig
from sepico.network import Segmentor, build_blank

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def describe(folder: str | Path) -> dict[str, Any]:
    """What `config.json` says: "model" (ModelConfig), "taxonomy", and "origin" of the weights.

    Raises ValueError, in one line, if the folder holds no exported network.
    """
    path = Path(folder, DESCRIPTION)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION}: write it with `python -m jobs.export`")
    return json.loads(path.read_text())


def load(folder: str | Path) -> Segmentor:
    """The network in eval mode on the CPU.

    Raises ValueError, in one line, as `describe` does, or if the weights are missing or damaged.
    """
    description, path = describe(folder), Path(folder, WEIGHTS)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}: write it with `python -m jobs.export`")
    return build(description, path.read_bytes(), str(path))


def build(description: dict[str, Any], weights: bytes, name: str) -> Segmentor:
    """`load` of what the two files hold; errors call the weights `name`."""
    network = build_blank(ModelConfig(**description["model"]), with_projection=False)
    try:
        network.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, SafetensorError):
        raise ValueError(
            f"{name} is damaged or of another network than {DESCRIPTION} says: export it again"
        ) from None
    return network.eval()
