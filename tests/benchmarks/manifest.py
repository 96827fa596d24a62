"""Start-up of 1,000 workers on a data set of ten million samples: bytes, memory, requests.

    python tests/benchmarks/manifest.py [--samples 10000000] [--workers 1000] [--per_node 8]

Writes a generated manifest to a local folder, opens it in 1 and in 4 processes of this machine, as
workers of a node do, and measures them; what a thousand workers ask a bucket for is computed, with
the draws of the sampler.
Memory is /proc/self/smaps_rollup's: `own` is private and dirty (nobody else has it, the system
cannot drop it), `share` is the process's part of what it maps (PSS), both beyond the imports.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.manifest import DOWNLOAD_BYTES, read_manifest, write_manifest
from cluster.sampling import Sampler
from cluster.shards import Shard
from cluster.storage import StorageConfig, open_storage
from sepico.taxonomies import CITYSCAPES_19

SAMPLE_BYTES, SHARD_BYTES = 185_000, 128 * 2**20
HEIGHT, WIDTH = 720, 1280
# Documented for one prefix of an S3 bucket; S3 splits a bucket by leading characters of its keys.
GETS_PER_PREFIX = 5_500
# Samples a second of one worker: two steps of two source and two target samples, and the most
# that two decoding threads get through.
RATES = {"training": 8, "decoding flat out": 480}
SETTINGS = {"seed": 0, "temperature": 0.01, "min_pixels": 3000}


def write(folder: str, samples: int) -> None:
    """A manifest of generated rows: per image about eight classes of unequal frequency."""
    rng = np.random.default_rng(0)
    frequency = np.linspace(0.9, 0.02, CITYSCAPES_19.num_classes)
    counts = np.zeros((samples, len(frequency)), np.uint32)
    for column, chance in enumerate(frequency):
        present = rng.random(samples, np.float32) < chance
        counts[present, column] = rng.integers(1, HEIGHT * WIDTH // 10, int(present.sum()))
    lengths = rng.integers(SAMPLE_BYTES // 2, SAMPLE_BYTES * 3 // 2, samples, np.uint32)
    each = SHARD_BYTES // SAMPLE_BYTES
    offsets = np.arange(samples, dtype=np.int64) % each * SAMPLE_BYTES
    numbers = pc.utf8_lpad(pc.cast(pa.array(np.arange(samples)), pa.string()), 9, "0")
    flat = pa.array(counts.reshape(-1))
    rows = pa.table(
        {
            "key": pc.binary_join_element_wise("frame", numbers, "_leftImg", "_"),
            "offset": offsets,
            "length": lengths,
            "checksum": rng.integers(0, 2**63, samples).astype(np.uint64),
            "height": np.full(samples, HEIGHT, np.int32),
            "width": np.full(samples, WIDTH, np.int32),
            "pixel_counts": pa.FixedSizeListArray.from_arrays(flat, len(frequency)),
        }
    )
    shards = []
    for index, begin in enumerate(range(0, samples, each)):
        name = f"shard-{index:05d}-{rng.bytes(8).hex()}-{rng.bytes(8).hex()}.arrow"
        shards.append((Shard(name, SHARD_BYTES, 0), rows.slice(begin, each)))
    storage = open_storage(folder, StorageConfig())
    write_manifest(storage, CITYSCAPES_19, shards, labelled=True, options={})


def memory() -> dict[str, float]:
    """Megabytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"own": kilobytes["Private_Dirty"] / 1024, "share": kilobytes["Pss"] / 1024}


def work(folder: str, barrier, queue) -> None:
    """One worker: open the manifest, build its sampler, look up what is drawn."""
    storage = open_storage(folder, StorageConfig())
    storage.exists("manifest.arrow")  # starts the client's threads
    before = memory()
    start = time.process_time()
    manifest = read_manifest(storage)
    opened = time.process_time() - start
    barrier.wait()
    after_open = memory()
    barrier.wait()
    start = time.process_time()
    sampler = Sampler(manifest.pixel_counts, len(manifest), global_batch=64, **SETTINGS)
    built = time.process_time() - start
    start = time.process_time()
    for step in range(100):
        for slot in range(64):
            draw = sampler.draw(step, slot)
            for index in (draw.source, draw.target):
                _ = manifest.keys[index], manifest.offsets[index], manifest.checksums[index]
    looked_up = (time.process_time() - start) / 6400
    barrier.wait()
    after_work = memory()
    barrier.wait()
    grown = [{k: after[k] - before[k] for k in before} for after in (after_open, after_work)]
    queue.put((opened, built, looked_up, *grown))


def measure(folder: str, name: str, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    arguments = folder, barrier, queue
    workers = [context.Process(target=work, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    opened, built, looked_up, after_open, after_work = results[0]
    print(
        f"{name}: open {opened:.2f} CPU-s, sampler "
        f"{built:.2f} CPU-s, draw and look-up {looked_up * 1e6:.0f} CPU-us"
    )
    for what, grown in (("manifest open", after_open), ("+ sampler, 6,400 draws", after_work)):
        print(f"    {what:<24} own {grown['own']:6.1f} MB, share {grown['share']:7.1f} MB")


def requests(folder: str, workers: int, per_node: int) -> None:
    """What the workers ask a bucket for, at the start and in a second of training."""
    size = Path(folder, "manifest.arrow").stat().st_size
    nodes = -(-workers // per_node)
    print(f"start of {workers} workers on {nodes} nodes, source and target of this size:")
    gets = 2 * nodes * -(-size // DOWNLOAD_BYTES)
    print(f"    HEAD {2 * workers}, GET {gets}, {2 * nodes * size / 1e9:.0f} GB in all, ", end="")
    print(f"{2 * size / per_node / 1e6:.0f} MB a worker")
    manifest = read_manifest(open_storage(folder, StorageConfig()))
    sampler = Sampler(manifest.pixel_counts, len(manifest), global_batch=workers, **SETTINGS)
    for name, rate in RATES.items():
        draws = [sampler.draw(*divmod(p, workers)) for p in range(min(workers * rate // 2, 50_000))]
        scale = workers * rate / (2 * len(draws))
        print(f"{name}: {workers * rate} GET/s; the busiest prefix, by characters of the index:")
        for digits in (0, 2, 3):
            asked = Counter(
                manifest.shards[manifest.shard[index]].name[: len("shard-") + digits]
                for draw in draws
                for index in (draw.source, draw.target)
            )
            busiest = max(asked.values()) * scale
            print(
                f"    {len(asked):>4} prefixes: {busiest:8.0f} GET/s, "
                f"{busiest / GETS_PER_PREFIX:6.2f} of {GETS_PER_PREFIX}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--per_node", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(folder, arguments.samples)
        )
        writer.start()
        writer.join()
        size = Path(folder, "manifest.arrow").stat().st_size
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"{arguments.samples} samples: manifest {size / 1e6:.0f} MB, "
            f"{size / arguments.samples:.0f} bytes a sample; written with {peak:.0f} MB at the peak"
        )
        # The first one writes the node's copy, here into the folder that is deleted.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        for name, processes in (("first of the node", 1), ("1 process", 1), ("4 processes", 4)):
            measure(folder, name, processes)
        requests(folder, arguments.workers, arguments.per_node)


if __name__ == "__main__":
    main()
