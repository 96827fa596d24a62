"""The actor that predicts: reads, decodes, predicts and writes a batch of images."""

from __future__ import annotations

import io
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from PIL import Image
from ray import ObjectRef

from cluster.prometheus import prediction_counters
from cluster.storage import StorageError, open_storage
from sepico.network import SIZE_ERRORS, size_error
from sepico.prediction import Prediction, Predictor, decode
from sepico.taxonomies import CITYSCAPES_LABEL_IDS, Taxonomy

if TYPE_CHECKING:
    from cluster.prediction import PredictConfig

FOLDERS = {"labels": "png", "overlays": "jpg", "confidence": "png"}  # and their files' suffixes
THREADS = 8  # requests of an actor that are under way at once


def output_keys(key: str, folders: list[str]) -> list[str]:
    """Keys of the files of the image at `key`, one in each of `folders`."""
    return [f"{name}/{PurePosixPath(key).with_suffix('')}.{FOLDERS[name]}" for name in folders]


class PredictImages:
    """Called by Ray Data with batches of keys; answers key and error ("" for none) of each."""

    def __init__(self, config: PredictConfig, taxonomy: Taxonomy, network: ObjectRef) -> None:
        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._predictor = Predictor(ray.get(network), taxonomy, config.inference).to(device)
        self._images = open_storage(config.images, config.storage)
        self._to = open_storage(config.to, config.storage)
        self._folders = config.folders
        self._table = np.arange(256, dtype=np.uint8)
        if config.ids == "label":
            ids = [CITYSCAPES_LABEL_IDS[name] for name in taxonomy.names]
            self._table[: len(ids)] = ids
        self._pool = ThreadPoolExecutor(THREADS)
        self._predicted, self._failed = prediction_counters()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        keys = [str(key) for key in batch["key"]]
        errors = dict.fromkeys(keys, "")
        by_size: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = defaultdict(list)
        for key, image in zip(
            keys, [self._pool.submit(self._read, key) for key in keys], strict=True
        ):
            try:
                planes = image.result()
                by_size[tuple(planes.shape)].append((key, planes))
            except (StorageError, ValueError) as error:
                errors[key] = str(error)
        writes: list[Future[None]] = []
        for group in by_size.values():
            names = [key for key, _ in group]
            try:
                found = self._predict([planes for _, planes in group])
            except SIZE_ERRORS as error:  # of a size the network cannot take, or the memory
                size = "x".join(map(str, reversed(group[0][1].shape[1:])))
                reason = size_error(error)
                errors |= {key: f"{key} of {size} pixels: {reason}" for key in names}
                continue
            pairs = zip(names, found, strict=True)
            writes += [self._pool.submit(self._write, key, prediction) for key, prediction in pairs]
        for write in writes:
            write.result()
        failed = sum(map(bool, errors.values()))
        for counter, count in ((self._predicted, len(keys) - failed), (self._failed, failed)):
            if count:  # Ray refuses to count nothing
                counter.inc(count)
        return {"key": keys, "error": [errors[key] for key in keys]}

    def _predict(self, images: list[torch.Tensor]) -> list[Prediction]:
        """Of images of one size: together, or one by one where a GPU's memory is too small."""
        try:
            return self._predictor.predict_batch(torch.stack(images))
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        torch.cuda.empty_cache()
        return [found for image in images for found in self._predict([image])]

    def _read(self, key: str) -> torch.Tensor:
        return decode(self._images.get(key), f"{self._images.url}/{key}")

    def _write(self, key: str, prediction: Prediction) -> None:
        for name, target in zip(self._folders, output_keys(key, self._folders), strict=True):
            if name == "labels":
                plane = self._table[prediction.labels]
            elif name == "overlays":
                plane = prediction.overlay()
            else:
                plane = (prediction.confidence * 255).round().astype(np.uint8)
            self._to.put(target, _encode(plane, FOLDERS[name]))


def _encode(plane: np.ndarray, suffix: str) -> bytes:
    # Zlib's fastest level: the default takes longer than a small network.
    kinds = {
        "jpg": {"format": "jpeg", "quality": 90},
        "png": {"format": "png", "compress_level": 1},
    }
    buffer = io.BytesIO()
    Image.fromarray(plane).save(buffer, **kinds[suffix])
    return buffer.getvalue()
