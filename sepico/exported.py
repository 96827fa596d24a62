"""A trained network in a folder: weights as safetensors, configuration and classes as JSON.

from sepico.exported import load

network = load("exported/")  # a Segmentor in eval mode, without projection head
logits, _ = network(network.normalize(image))  # (1, 3, H, W) float32 on the 0..1 scale
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sepico.config import ModelConfig
from sepico.network import Segmentor, build_segmentor

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
    """The network in eval mode on the CPU. Raises ValueError as `describe` does."""
    network = build_segmentor(ModelConfig(**describe(folder)["model"]), with_projection=False)
    network.load_state_dict(load_file(Path(folder, WEIGHTS)))
    return network.eval()
