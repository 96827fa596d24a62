"""The classes of a label plane: names, palette and the value that means "no label".

A taxonomy travels with the data (a data set's `classes.json`, then its manifest), so that a
network, a confusion matrix and a picture can never disagree about what class 3 is.

The street-scene data sets share the 19 classes that Cityscapes evaluates. SYNTHIA has 16 of them
and is also reported on 13, so `TAXONOMIES` holds all three sets, in Cityscapes' order.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        if len(self.names) < 2:
            raise ValueError(f"a taxonomy needs at least two classes, here are {len(self.names)}")
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

    def train_id_table(self, ids: Mapping[str, int]) -> np.ndarray:
        """(256,) uint8: the train id of every label id, `ignore_index` where there is none.

        `ids` gives the label id of each class name; raises KeyError for a class without one.
        """
        table = np.full(256, self.ignore_index, np.uint8)
        table[[ids[name] for name in self.names]] = np.arange(self.num_classes)
        return table

    def without(self, *names: str) -> Taxonomy:
        """The same classes in the same order, but for those in `names`."""
        kept = [i for i, name in enumerate(self.names) if name not in names]
        return Taxonomy(
            tuple(self.names[i] for i in kept),
            tuple(self.colors[i] for i in kept),
            self.ignore_index,
        )

    def reported_subsets(self) -> dict[int, list[int]]:
        """Number of classes -> their train ids, for subsets that results are also reported on.

        Those of SYNTHIA's 16 and 13 classes that are contained in these, which hold more.
        """
        return {
            subset.num_classes: [self.names.index(name) for name in subset.names]
            for subset in (CITYSCAPES_16, CITYSCAPES_13)
            if set(subset.names) < set(self.names)
        }


# name: (label id, RGB colour), in train-id order; from the label table of Cityscapes, whose ids
# the palette images of GTAV use as well.
_CITYSCAPES = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
CITYSCAPES_LABEL_IDS = {name: label_id for name, (label_id, _) in _CITYSCAPES.items()}
CITYSCAPES_TRAIN_IDS = {name: i for i, name in enumerate(_CITYSCAPES)}

# From the list of classes that comes with SYNTHIA-RAND-CITYSCAPES. Terrain, truck and train have
# ids but no pixels.
SYNTHIA_LABEL_IDS = {
    "sky": 1, "building": 2, "road": 3, "sidewalk": 4, "fence": 5, "vegetation": 6, "pole": 7,
    "car": 8, "traffic sign": 9, "person": 10, "bicycle": 11, "motorcycle": 12,
    "traffic light": 15, "terrain": 16, "rider": 17, "truck": 18, "bus": 19, "train": 20,
    "wall": 21,
}  # fmt: skip

CITYSCAPES_19 = Taxonomy(tuple(_CITYSCAPES), tuple(color for _, color in _CITYSCAPES.values()))
CITYSCAPES_16 = CITYSCAPES_19.without("terrain", "truck", "train")
CITYSCAPES_13 = CITYSCAPES_16.without("wall", "fence", "pole")
TAXONOMIES = {
    "cityscapes19": CITYSCAPES_19,
    "cityscapes16": CITYSCAPES_16,
    "cityscapes13": CITYSCAPES_13,
}
