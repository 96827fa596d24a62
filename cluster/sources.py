"""One sample's files, and how an image, a label plane and their bytes are read from them.

Whatever is wrong with a file is a ValueError of one line that names the file and the fix.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_image

from sepico.taxonomies import Taxonomy

# Bytes 24 and 25 of a PNG: bit depth and colour type (0 grey, 2 RGB, 3 palette, 4 and 6 alpha).
# A file of another kind would decode to other numbers than it means, so the kind is checked.
PNG_KINDS = {
    "8-bit grayscale": {(8, 0)},
    "8-bit palette": {(8, 3)},
    "16-bit": {(16, 0), (16, 2), (16, 4), (16, 6)},
}


@dataclass(frozen=True)
class LabelCoding:
    """What the numbers in a label PNG mean.

    `png` is a key of PNG_KINDS: a palette image means its indices, not its colours, and of
    several channels the first one counts. `ids` is the number of each class name; every other
    number is unlabelled. Without `ids` the numbers are train ids, and any other is an error.
    """

    png: str = "8-bit grayscale"
    ids: Mapping[str, int] | None = None


TRAIN_IDS = LabelCoding()


@dataclass(frozen=True)
class Source:
    """The files of one sample.

    `label` is None when labels are not stored, `reference` (an image of the same place in good
    conditions) when there is none. `rescale_label` allows a label of another size than its image.
    """

    key: str
    image: Path
    label: Path | None = None
    reference: Path | None = None
    coding: LabelCoding = TRAIN_IDS
    rescale_label: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(filter(None, (self.image, self.label, self.reference)))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def read_image(path: Path) -> tuple[bytes, torch.Tensor]:
    """The file's bytes and the decoded (3, H, W) uint8 image."""
    data = read_file(path)
    try:
        image = decode_image(_tensor(data), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} does not decode as an image: replace it") from None
    if image.dtype != torch.uint8:
        raise ValueError(f"{path} is a 16-bit PNG: convert it to 8 bits a channel")
    return data, image


def read_label(path: Path, taxonomy: Taxonomy, coding: LabelCoding = TRAIN_IDS) -> torch.Tensor:
    """The label plane as (H, W) uint8 train ids of `taxonomy`."""
    data = read_file(path)
    if tuple(data[24:26]) not in PNG_KINDS[coding.png]:
        numbers = "train ids" if coding.ids is None else "label ids"
        raise ValueError(f"{path} is no {coding.png} PNG: write the {numbers} as one")
    try:
        plane = decode_image(_tensor(data), mode=ImageReadMode.UNCHANGED)[0].numpy()
    except RuntimeError:
        raise ValueError(f"{path} does not decode as a PNG: replace it") from None
    if coding.ids is not None:
        if plane.max() > 255:
            raise ValueError(f"{path} holds the value {plane.max()}: label ids are 0..255")
        return torch.from_numpy(taxonomy.train_id_table(coding.ids)[plane])
    values = np.unique(plane)
    outside = values[(values >= taxonomy.num_classes) & (values != taxonomy.ignore_index)]
    if outside.size:
        raise ValueError(
            f"{path} holds the value {outside[0]}, but the classes are "
            f"0..{taxonomy.num_classes - 1} and {taxonomy.ignore_index} for unlabelled: "
            "convert it to train ids or correct classes.json"
        )
    return torch.from_numpy(plane)


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises ValueError, in one line, where this node cannot read it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read on {socket.gethostname()} ({error.strerror}): the folder must "
            "be visible from every node of the cluster"
        ) from None


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
