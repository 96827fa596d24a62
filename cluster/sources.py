"""A data set as a folder: images/STEM.jpg, labels/STEM.png, classes.json, lists of stems.

Whatever is wrong with a folder or a file in it is a ValueError of one line that names the file
and the fix.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_image

from sepico.taxonomies import Taxonomy

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Source:
    """The files of one sample; `label` is None when labels are not stored."""

    key: str
    image: Path
    label: Path | None

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in (self.image, self.label) if path)


def find_sources(root: Path, list_file: str | None, labels: bool) -> list[Source]:
    """The samples below `root`, sorted by key: those in `list_file`, or every image.

    Raises ValueError that names what is missing.
    """
    images = _stems(root / "images", IMAGE_SUFFIXES)
    keys = sorted(images) if list_file is None else _listed(root, list_file, images)
    if not keys:
        raise ValueError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {root / 'images'}")
    if not labels:
        return [Source(key, images[key], None) for key in keys]
    planes = _stems(root / "labels", (".png",))
    missing = [key for key in keys if key not in planes]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no label, first {root / 'labels' / missing[0]}.png: "
            "add the labels, or store none with --labels false"
        )
    return [Source(key, images[key], planes[key]) for key in keys]


def read_taxonomy(root: Path, classes: str | None) -> Taxonomy:
    """The class file `classes`, or classes.json in `root` or in the folder above it."""
    places = [root / "classes.json", root.absolute().parent / "classes.json"]
    if classes is not None:
        places = [Path(classes)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        tried = " nor ".join(str(place) for place in places)
        raise ValueError(f"no class file at {tried}: name one with --classes")
    try:
        return Taxonomy.from_dict(json.loads(place.read_text()))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _stems(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """File stem -> path. One listing: a stat a file is slow on shared file systems."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: --root must hold images/ and labels/")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have one stem: rename one")
            found[path.stem] = path
    return found


def _listed(root: Path, list_file: str, images: dict[str, Path]) -> list[str]:
    path = root / list_file
    if not path.is_file():
        raise ValueError(f"no list file {path}: --list is relative to --root, or absolute")
    keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{path} lists nothing: one image stem a line is needed")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{path} lists {twice!r} twice: remove one")
    missing = [key for key in keys if key not in images]
    if missing:
        raise ValueError(
            f"{path} lists {missing[0]!r}, which is not in {root / 'images'} "
            f"({len(missing)} missing in all): add the images or correct the list"
        )
    return sorted(keys)


def read_image(path: Path) -> tuple[bytes, torch.Tensor]:
    """The file's bytes and the decoded (3, H, W) uint8 image."""
    data = _read(path)
    try:
        return data, decode_image(_tensor(data), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} does not decode as an image: replace it") from None


def read_label(path: Path, taxonomy: Taxonomy) -> torch.Tensor:
    """The decoded (H, W) uint8 label plane."""
    data = _read(path)
    # Bytes 24 and 25 of a PNG: bit depth 8 and colour type 0. A palette or 16-bit file would
    # decode to other numbers than it shows.
    if data[24:26] != b"\x08\x00":
        raise ValueError(f"{path} is no 8-bit grayscale PNG: write the train ids as one")
    try:
        label = decode_image(_tensor(data), mode=ImageReadMode.UNCHANGED)[0]
    except RuntimeError:
        raise ValueError(f"{path} does not decode as a PNG: replace it") from None
    values = np.unique(label.numpy())
    outside = values[(values >= taxonomy.num_classes) & (values != taxonomy.ignore_index)]
    if outside.size:
        raise ValueError(
            f"{path} holds the value {outside[0]}, but the classes are "
            f"0..{taxonomy.num_classes - 1} and {taxonomy.ignore_index} for unlabelled: "
            "convert it to train ids or correct classes.json"
        )
    return label


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read on {socket.gethostname()} ({error.strerror}): the folder must "
            "be visible from every node of the cluster"
        ) from None


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
