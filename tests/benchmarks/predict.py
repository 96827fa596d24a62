"""Images a second of `jobs.predict` with 1 and 2 workers, beside those of the bare network.

    python tests/benchmarks/predict.py [--images 96] [--size 640x360] [--encoder NAME]

The bare network is one process on one thread with decoded images in memory; the job reads JPEG
files and writes labels, overlays and confidences. Weights are random: speed does not depend on
them. Times of a job count from its start on a running cluster of 2 cores to its end, its actors'
start included; the rate in between leaves out the start.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image
from safetensors.torch import save

import sepico
from cluster.prediction import PredictConfig, predict
from jobs.street_scenes import TAXONOMY
from sepico.config import ModelConfig
from sepico.exported import DESCRIPTION, WEIGHTS
from sepico.network import build_segmentor


def write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.BILINEAR).save(folder / f"{index:04d}.jpg")


def write_network(folder: Path, encoder: str) -> None:
    folder.mkdir()
    model = {"encoder": encoder, "encoder_weights": None, "head_channels": 64}
    model |= {"head_dilations": [1], "num_classes": TAXONOMY.num_classes}
    network = build_segmentor(ModelConfig(**model), with_projection=False)
    (folder / WEIGHTS).write_bytes(save(network.state_dict()))
    description = {"model": model, "taxonomy": TAXONOMY.to_dict(), "origin": {"run": "none"}}
    (folder / DESCRIPTION).write_text(json.dumps(description))


def bare_rate(network: Path, images: Path, batch: int) -> float:
    """Images a second of the network on one thread."""
    torch.set_num_threads(1)
    predictor = sepico.load(network)
    files = sorted(images.iterdir())[: 2 * batch]
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files]
    batches = torch.stack(pixels).split(batch)
    predictor.predict_batch(batches[0])
    began = time.perf_counter()
    for part in batches:
        predictor.predict_batch(part)
    return len(pixels) / (time.perf_counter() - began)


def job_seconds(network: Path, images: Path, to: Path, workers: int, batch: int) -> float:
    began = time.perf_counter()
    options = {"exported": str(network), "workers": workers, "batch": batch}
    predict(PredictConfig(images=str(images), to=str(to), **options))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options}")
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_network(root / "network", options.encoder)
        write_images(root / "few", 2 * options.batch, (width, height))
        write_images(root / "many", options.images + 2 * options.batch, (width, height))
        bare = bare_rate(root / "network", root / "few", options.batch)
        print(f"bare network, 1 thread: {bare:.2f} images/s")
        for workers in (1, 2):
            # Two jobs that differ in their number of images: the difference has no start in it.
            common = root / "network"
            few = job_seconds(common, root / "few", root / f"a{workers}", workers, options.batch)
            many = job_seconds(common, root / "many", root / f"b{workers}", workers, options.batch)
            rate = options.images / (many - few)
            share = rate / (workers * bare)
            print(
                f"{workers} workers: {rate:.2f} images/s, {share:.0%} of the bare network on as "
                f"many threads; {many:.1f} s in all"
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
