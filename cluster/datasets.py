"""Data sets as they are published, and a folder of one's own: which files make which sample.

A `Dataset` describes a layout; `cluster.layouts` holds one for every name of `--dataset`. Images
lie below one folder and labels below another, with the same sub-folders and one suffix each:

    ROOT/IMAGES/FOLDER/.../KEY + image suffix
    ROOT/LABELS/FOLDER/.../KEY + label suffix

where FOLDER belongs to the split. KEY, the file's name without the suffix, names the sample. An
image of the same place in good conditions, its reference, is found by CSV files or by its KEY.
Whatever is missing is a ValueError of one line that names it and says where it is had from.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.sources import TRAIN_IDS, LabelCoding, Source
from sepico.taxonomies import TAXONOMIES, Taxonomy


@dataclass(frozen=True)
class Dataset:
    """Where the files of a data set lie below its root, and what its labels mean."""

    images: str
    image_suffixes: tuple[str, ...]
    labels: str
    label_suffix: str
    splits: Mapping[str, tuple[str, ...]]  # split -> its folders; the first split is the default
    home: str  # what to download from where; ends a message about a missing part
    coding: LabelCoding = TRAIN_IDS
    classes: str | None = "cityscapes19"  # a name in TAXONOMIES; None: a classes.json in the root
    unlabelled: frozenset[str] = frozenset()  # splits whose labels are not public
    subset: str | None = None  # a file in the root that lists the keys in use
    correspondences: Mapping[str, str] = field(default_factory=dict)  # split -> folder of CSVs
    references: str | None = None  # a folder of references by key, which need not be there
    rescaled: frozenset[str] = frozenset()  # keys published with a label of another size

    def pick_split(self, split: str | None) -> str:
        """`split`, or the first one for None. Raises ValueError that lists them."""
        if split is not None and split not in self.splits:
            raise ValueError(f"no split {split!r}: the data set has {', '.join(self.splits)}")
        return split or next(iter(self.splits))

    def stem(self, path: Path) -> str:
        """The path without the image suffix that it ends in."""
        text = path.as_posix()
        suffix = next(s for s in self.image_suffixes if text.lower().endswith(s.lower()))
        return text[: -len(suffix)]

    def label_of(self, root: Path, image: Path) -> Path:
        below = self.stem(image.relative_to(root / self.images))
        return root / self.labels / f"{below}{self.label_suffix}"


def find_sources(
    root: Path, dataset: Dataset, split: str | None, list_file: str | None, labels: bool
) -> list[Source]:
    """The samples of a split (None: the first), sorted by key: those in `list_file`, or all.

    Raises ValueError that names what is missing.
    """
    split = dataset.pick_split(split)
    if labels and split in dataset.unlabelled:
        raise ValueError(f"split {split} has no public labels: store none with --labels false")
    images = _images(root, dataset, split)
    keys = sorted(images) if list_file is None else _listed(root, list_file, images)
    images = {key: images[key] for key in keys}
    label_of: dict[str, Path] = {}
    if labels:
        label_of = {key: dataset.label_of(root, image) for key, image in images.items()}
        _check_labels(root, dataset, split, label_of)
    reference_of: dict[str, Path] = {}
    if split in dataset.correspondences:
        reference_of = _references(root, dataset, split, images)
    elif dataset.references and (root / dataset.references).is_dir():
        reference_of = _references_by_key(root / dataset.references, dataset, images)
    return [
        Source(
            key,
            image,
            label_of.get(key),
            reference_of.get(key),
            dataset.coding,
            rescale_label=key in dataset.rescaled,
        )
        for key, image in images.items()
    ]


def read_taxonomy(root: Path, dataset: Dataset, classes: str | None) -> Taxonomy:
    """The classes named or in the file `classes`; else those of `dataset`.

    A folder of one's own has them in classes.json, in `root` or in the folder above it.
    """
    classes = classes or dataset.classes
    if classes in TAXONOMIES:
        taxonomy = TAXONOMIES[classes]
    else:
        places = [root / "classes.json", root.absolute().parent / "classes.json"]
        taxonomy = _read_classes([Path(classes)] if classes else places)
    unknown = set(taxonomy.names) - set(dataset.coding.ids or taxonomy.names)
    if unknown:
        raise ValueError(
            f"{classes} has the class {min(unknown)!r}, the data set's are: "
            f"{', '.join(dataset.coding.ids)}"
        )
    return taxonomy


def _read_classes(places: list[Path]) -> Taxonomy:
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        tried = " nor ".join(str(place) for place in places)
        raise ValueError(
            f"no class file at {tried}: name one with --classes, or one of {', '.join(TAXONOMIES)}"
        )
    try:
        return Taxonomy.from_dict(json.loads(place.read_text()))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _images(root: Path, dataset: Dataset, split: str) -> dict[str, Path]:
    """Key -> image of a split."""
    found: dict[str, Path] = {}
    suffixes = tuple(suffix.lower() for suffix in dataset.image_suffixes)
    for folder in dataset.splits[split]:
        for path in _files(root / dataset.images / folder, dataset.home):
            if path.name.lower().endswith(suffixes):
                key = dataset.stem(Path(path.name))
                if key in found:
                    raise ValueError(f"{found[key]} and {path} have one stem: rename one")
                found[key] = path
    if dataset.subset is not None:
        found = _subset(root / dataset.subset, dataset.home, found)
    if not found:
        folders = " or ".join(str(root / dataset.images / f) for f in dataset.splits[split])
        endings = ", ".join(dataset.image_suffixes)
        raise ValueError(f"no images ({endings}) in {folders}: {dataset.home}")
    return found


def _files(folder: Path, home: str) -> list[Path]:
    """All files below `folder`. One listing: a stat a file is slow on shared file systems."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: {home}")
    walk = os.walk(folder, followlinks=True)
    return sorted(Path(place) / name for place, _, names in walk for name in names)


def _check_labels(root: Path, dataset: Dataset, split: str, label_of: Mapping[str, Path]) -> None:
    present: set[Path] = set()
    for folder in dataset.splits[split]:
        present.update(_files(root / dataset.labels / folder, dataset.home))
    missing = [path for path in label_of.values() if path not in present]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no label, first {missing[0]}: "
            f"add the labels, or store none with --labels false ({dataset.home})"
        )


def _references(
    root: Path, dataset: Dataset, split: str, images: Mapping[str, Path]
) -> dict[str, Path]:
    """Key -> the image of the same place that the CSV files pair with it.

    A line of a CSV file holds two paths below the image folder, without the suffix: an image and
    its reference.
    """
    folder = root / dataset.correspondences[split]
    pairs: dict[str, str] = {}
    for path in _files(folder, dataset.home):
        if path.suffix != ".csv":
            continue
        with path.open(newline="") as file:
            for row in filter(None, csv.reader(file)):
                if len(row) < 2 or pairs.setdefault(row[0], row[1]) != row[1]:
                    raise ValueError(f"{path}: {row[0]!r} has no reference, or two: {dataset.home}")
    found: dict[str, Path] = {}
    for key, image in images.items():
        below = dataset.stem(image.relative_to(root / dataset.images))
        if below not in pairs:
            raise ValueError(f"no CSV file in {folder} pairs {below!r}: {dataset.home}")
        found[key] = root / dataset.images / f"{pairs[below]}{dataset.image_suffixes[0]}"
        if not found[key].is_file():
            raise ValueError(f"{image} has no reference {found[key]}: {dataset.home}")
    return found


def _references_by_key(
    folder: Path, dataset: Dataset, images: Mapping[str, Path]
) -> dict[str, Path]:
    """Key -> the image below `folder` with that key."""
    suffixes = tuple(suffix.lower() for suffix in dataset.image_suffixes)
    files = _files(folder, dataset.home)
    found = {
        dataset.stem(Path(path.name)): path
        for path in files
        if path.name.lower().endswith(suffixes)
    }
    missing = [key for key in images if key not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no reference in {folder}, first {missing[0]!r}: "
            "add the references, or take the folder away to store none"
        )
    return {key: found[key] for key in images}


def _subset(path: Path, home: str, images: Mapping[str, Path]) -> dict[str, Path]:
    """Of `images`, those whose key begins the name of a file that a line of `path` gives."""
    if not path.is_file():
        raise ValueError(f"no file {path}: {home}")
    names = [Path(line.strip()).name for line in path.read_text().splitlines() if line.strip()]
    keys = [re.split(r"[._]", name)[0] for name in names]
    missing = [key for key in keys if key not in images]
    if missing:
        raise ValueError(f"{path} lists {missing[0]!r}, which is not among the images: {home}")
    return {key: images[key] for key in keys}


def _listed(root: Path, list_file: str, images: Mapping[str, Path]) -> list[str]:
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
            f"{path} lists {missing[0]!r}, which is not in the images of {root} "
            f"({len(missing)} missing in all): add the images or correct the list"
        )
    return sorted(keys)
