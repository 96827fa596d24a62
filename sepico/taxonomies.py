"""The classes of a label plane: names, palette and the value that means "no label".

A taxonomy travels with the data (a data set's `classes.json`, then its manifest), so that a
network, a confusion matrix and a picture can never disagree about what class 3 is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Taxonomy:
    """Class names and RGB colours in train-id order; `ignore_index` marks unlabelled pixels."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(f"{len(self.names)} class names but {len(self.colors)} colours")
        if not self.names:
            raise ValueError("a taxonomy needs at least one class")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"class names repeat: {sorted(self.names)}")
        if not 0 <= self.ignore_index <= 255 or self.ignore_index < len(self.names):
            raise ValueError(
                f"ignore_index {self.ignore_index} must lie in {len(self.names)}..255, "
                "above the class ids and inside a byte"
            )

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> Taxonomy:
        """Read the content of a `classes.json`.

        Expects `{"ignore_index": 255, "classes": [{"train_id", "name", "color"}, ...]}` with
        train ids 0..C-1. Raises ValueError that names the offending entry.
        """
        try:
            entries = sorted(description["classes"], key=lambda entry: entry["train_id"])
            train_ids = [entry["train_id"] for entry in entries]
            names = tuple(str(entry["name"]) for entry in entries)
            colors = tuple(tuple(int(v) for v in entry["color"]) for entry in entries)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"classes need 'train_id', 'name' and 'color' each; missing or malformed: {error}"
            ) from None
        if train_ids != list(range(len(train_ids))):
            raise ValueError(f"train ids must be 0..{len(train_ids) - 1} once each: {train_ids}")
        if any(len(color) != 3 or not all(0 <= v <= 255 for v in color) for color in colors):
            raise ValueError("every 'color' is three integers 0..255")
        return cls(names, colors, int(description.get("ignore_index", 255)))

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        classes = [
            {"train_id": i, "name": name, "color": list(color)}
            for i, (name, color) in enumerate(zip(self.names, self.colors, strict=True))
        ]
        return {"ignore_index": self.ignore_index, "classes": classes}

    def paint(self, labels: np.ndarray) -> np.ndarray:
        """Colour a label plane: (H, W) integers -> (H, W, 3) uint8; ignored pixels are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: self.num_classes] = self.colors
        return palette[labels]
