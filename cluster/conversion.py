"""Image and label files -> the bytes of one shard, a pure function of them and of the options.

`inputs_digest` names everything those bytes depend on, so a shard that carries the digest of its
inputs need not be built again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torchvision
import xxhash
from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cluster.manifest import SCHEMA_VERSION
from cluster.shards import LABEL_CODEC, LABEL_COMPRESSION_LEVEL, ShardWriter, shard_rows
from cluster.sources import Source, read_file, read_image, read_label
from sepico.taxonomies import Taxonomy

JPEG_QUALITY = 95
# Samples converted to learn how large the others become.
PROBES = 16


def build_shard(
    sources: Sequence[Source], taxonomy: Taxonomy, size: tuple[int, int] | None
) -> tuple[pa.Buffer, pa.Table]:
    """One shard's bytes and manifest rows; images and labels in `size` (H, W) if it is given.

    Raises ValueError that names the bad file.
    """
    writer = ShardWriter(taxonomy)
    for source in sources:
        encoded, image = read_image(source.image)
        label = None if source.label is None else _label_plane(source, taxonomy, image, size)
        reference = None
        if source.reference is not None:
            reference, reference_image = read_image(source.reference)
            _check_size(source, source.reference, reference_image, image)
            reference, _ = _resized(reference, reference_image, size)
        encoded, image = _resized(encoded, image, size)
        height_width = (image.shape[1], image.shape[2])
        writer.add(source.key, encoded, height_width, label, reference)
    data = writer.finish()
    return data, shard_rows(data, taxonomy.num_classes)


def inputs_digest(
    sources: Sequence[Source], taxonomy: Taxonomy, size: tuple[int, int] | None
) -> str:
    """xxh3 of all that `build_shard` makes its bytes of: files, options, the encoders' versions.

    The content of the files counts, not their dates: a copy is the same input, and a file that
    changed within its size and date is another one.
    """
    encoders = torchvision.__version__, pa.__version__, JPEG_QUALITY
    labels = LABEL_CODEC, LABEL_COMPRESSION_LEVEL, taxonomy.to_dict()
    digest = xxhash.xxh3_64(repr((SCHEMA_VERSION, encoders, labels, size)).encode())
    for source in sources:
        kinds = source.label is not None, source.reference is not None
        meaning = source.key, kinds, source.coding, source.rescale_label
        digest.update(repr(meaning).encode())
        for path in source.files:
            content = read_file(path)
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def stored_sizes(
    sources: Sequence[Source], taxonomy: Taxonomy, size: tuple[int, int] | None
) -> list[int]:
    """About how many bytes of a shard each sample takes, from a few that are converted."""
    probes = sources[:: -(-len(sources) // PROBES)]
    data, _ = build_shard(probes, taxonomy, size)
    before = sum(source.size for source in probes)
    return [max(1, source.size * data.size // before) for source in sources]


def _label_plane(
    source: Source, taxonomy: Taxonomy, image: torch.Tensor, size: tuple[int, int] | None
) -> np.ndarray:
    """The (H, W) uint8 label as it is stored: in `size`, else in the size of its image."""
    label = read_label(source.label, taxonomy, source.coding)
    if not source.rescale_label:
        _check_size(source, source.label, label, image)
    height_width = size or tuple(image.shape[1:])
    if tuple(label.shape) != height_width:
        # "exact" samples at pixel centres, as the image's filter does.
        label = resize(label[None], list(height_width), InterpolationMode.NEAREST_EXACT)[0]
    return label.numpy()


def _resized(
    encoded: bytes, image: torch.Tensor, size: tuple[int, int] | None
) -> tuple[bytes, torch.Tensor]:
    """The image in `size` and its bytes: the file's own if it has that size already."""
    if size is None or tuple(image.shape[1:]) == size:
        return encoded, image
    image = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return encode_jpeg(image, JPEG_QUALITY).numpy().tobytes(), image


def _check_size(source: Source, path: Path, plane: torch.Tensor, image: torch.Tensor) -> None:
    if plane.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"{path} is {_size(plane)} but its image {source.image} is {_size(image)}: "
            "they must be the same size"
        )


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
