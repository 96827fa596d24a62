"""Predictions of a test set without labels, as the servers of Dark Zurich and ACDC take them.

A zip file of three folders with one PNG an image, named after it: `labelTrainIds` (8-bit train
ids), `labelTrainIds_invalid` (the same, 255 where the prediction is declared invalid, for the
uncertainty-aware IoU) and `confidence` (16-bit, 0..65535 for 0..1). Every worker writes a zip file
of its share; the driver joins them.
"""

import io
import zipfile
from collections.abc import Iterable
from tempfile import TemporaryFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.storage import Storage, StorageConfig, open_storage

LABELS, VALID_LABELS, CONFIDENCE = "labelTrainIds", "labelTrainIds_invalid", "confidence"
INVALID = 255


def write_part(
    predictions: Iterable[tuple[str, Tensor]], store: Storage, key: str, invalid_below: float
) -> None:
    """Write the images' probabilities (C, H, W), by name, as one zip file."""
    with TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as part:  # PNGs do not compress further
            for name, probabilities in predictions:
                confidence, labels = (plane.cpu() for plane in probabilities.max(0))
                valid = torch.where(confidence < invalid_below, INVALID, labels)
                sure = (confidence.double() * 65535).round().numpy().astype(np.uint16)
                part.writestr(f"{LABELS}/{name}.png", png(labels.byte().numpy()))
                part.writestr(f"{VALID_LABELS}/{name}.png", png(valid.byte().numpy()))
                part.writestr(f"{CONFIDENCE}/{name}.png", png(sure))
        file.seek(0)
        store.put(key, file.read())


def merge_parts(keys: list[str], folder: str, storage: StorageConfig) -> str:
    """Join the parts at `keys` of a folder and delete them; returns the zip file's URL."""
    store = open_storage(folder, storage)
    target = f"{keys[0].rpartition('/')[0]}/submission.zip"
    with TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as whole:
            for key in keys:
                with zipfile.ZipFile(io.BytesIO(store.get(key))) as part:
                    for name in part.namelist():
                        whole.writestr(name, part.read(name))
        file.seek(0)
        store.put(target, file.read())
    for key in keys:
        store.delete(key)
    return f"{store.url}/{target}"


def png(plane: np.ndarray) -> bytes:
    """(H, W) uint8 or uint16, or (H, W, 3) uint8 -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(plane).save(buffer, format="png")
    return buffer.getvalue()
