"""SePiCo: semantic-guided pixel contrast for domain adaptive segmentation, in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sepico.lazy_compiler import import_compiler_lazily

if TYPE_CHECKING:
    from sepico.prediction import InferenceConfig, Predictor

import_compiler_lazily()


def load(path: str | Path, config: InferenceConfig | None = None) -> Predictor:
    """`sepico.load(path).predict(image)`: see `sepico.prediction`, imported when it is needed."""
    from sepico import prediction

    return prediction.load(path, config)
