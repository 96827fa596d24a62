"""Readers of training data side by side: one server, the same images, each in its own format.

    python tests/benchmarks/data.py [--samples 512 4096] [--processes 1 2] [--outputs raw decoded]
        [--readers ours ...]

Without --readers all that are installed run (extra `bench`). Every measurement has processes of
its own, pinned to a core each, which have read a small data set before (imports and connections
are not counted) and have nothing on disk; several processes share the samples out. `limit` is
what no reader can beat: unchecked ranges of the same bytes, or decoding them in memory. CPU is
the processes' own with threads and children, and `of limit` compares it: unlike the time that
passed, it says the same on a busy machine. `first` is the first batch, from the constructor on.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg, encode_png

from tests.benchmarks.data_formats import READERS, upload
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, run_s3_server

DISTINCT, HEIGHT, WIDTH = 64, 512, 1024
WARM, FIRST_BATCH = 16, 8
OUTPUTS = ["raw", "decoded"]
MODULES = {"mosaic": "streaming", "litdata": "litdata", "webdataset, in order": "webdataset"}


class PeerDiedError(RuntimeError):
    """A reader's process ended before it had printed its figures."""


def make_images() -> list[tuple[bytes, np.ndarray, bytes]]:
    """Pictures of smooth regions with grain, about 180 KB as JPEG, and labels with regions.

    A label comes as it is and as PNG.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(DISTINCT):
        coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 16, 32))).float()
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        grain = torch.from_numpy(rng.normal(0, 6.5, (1, HEIGHT, WIDTH))).float()
        jpeg = encode_jpeg((smooth + grain).clamp(0, 255).byte(), 90)
        scores = torch.from_numpy(rng.normal(size=(1, 19, 12, 24))).float()
        label = torch.nn.functional.interpolate(scores, (HEIGHT, WIDTH), mode="bilinear").argmax(1)
        label = label.byte()
        png = encode_png(label).numpy().tobytes()
        images.append((jpeg.numpy().tobytes(), label[0].numpy(), png))
    return images


def measure(name: str, url: str, warm_url: str, endpoint: str, decoded: bool) -> dict[str, float]:
    """In a process of its own: read everything once, from the parent's signal on."""
    reader, scratch = READERS[name], Path(tempfile.mkdtemp(prefix="bench-"))
    torch.set_num_threads(1)
    for _ in reader.read(warm_url, endpoint, scratch / "warm", decoded):
        pass
    print("ready", flush=True)
    sys.stdin.readline()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory from here on
    before, began, cpu = _status("VmRSS"), time.perf_counter(), _cpu()
    count, first = 0, 0.0
    for sample in reader.read(url, endpoint, scratch / "cold", decoded):
        if sample is None:  # preparations of the limit
            began, cpu = time.perf_counter(), _cpu()
            continue
        count += 1
        if count == FIRST_BATCH:
            first = time.perf_counter() - began
    ended, spent = time.perf_counter(), _cpu() - cpu
    cold = scratch / "cold"
    disk = sum(p.stat().st_size for p in cold.rglob("*") if p.is_file()) if cold.exists() else 0
    shutil.rmtree(scratch, ignore_errors=True)
    memory = _status("VmHWM") - before
    return {
        "count": count, "seconds": ended - began, "cpu": spent, "first": first,
        "memory": memory / 1e6, "disk": disk / 1e6,
    }  # fmt: skip


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def run(name: str, urls: list[str], warm_url: str, endpoint: str, decoded: bool) -> dict:
    """One process for each URL, at the same time; their results together."""
    children = []
    for core, url in enumerate(urls):
        arguments = json.dumps([name, url, warm_url, endpoint, decoded])
        command = ["taskset", "-c", str(core % os.cpu_count()), sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.append(
            subprocess.Popen([*command, "--child", arguments], stderr=subprocess.DEVNULL, **pipes)
        )
    try:
        for child in children:
            while (line := child.stdout.readline()) != "ready\n":
                if not line:
                    raise PeerDiedError
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        lines = [child.communicate()[0].splitlines() for child in children]
        results = [json.loads(printed[-1]) for printed in lines]
    except (PeerDiedError, BrokenPipeError, IndexError, json.JSONDecodeError):
        raise PeerDiedError(f"{name} died: run it with --child by hand") from None
    finally:
        for child in children:
            child.kill()
            child.wait()
    count = sum(result["count"] for result in results)
    return {
        "rate": count / max(result["seconds"] for result in results),
        "cpu": 1000 * sum(result["cpu"] for result in results) / count,
        "first": 1000 * max(result["first"] for result in results),
        "memory": max(result["memory"] for result in results),
        "disk": sum(result["disk"] for result in results),
        "count": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--outputs", nargs="+", choices=OUTPUTS, default=OUTPUTS)
    parser.add_argument("--readers", nargs="+", choices=READERS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*json.loads(arguments.child))))
        return
    installed = [n for n in READERS if n not in MODULES or importlib.util.find_spec(MODULES[n])]
    readers = arguments.readers or installed
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        del os.environ[key]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    images = make_images()
    mean = np.mean([len(image) for image, _, _ in images])
    print(f"{platform.platform()}, {os.cpu_count()} cores; JPEG {mean / 1e3:.0f} KB on average")
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as root,
        run_s3_server(_made(root, "s3")) as s3,
    ):
        runs = product(arguments.samples, arguments.processes, arguments.outputs)
        compare(Path(root), s3, images, readers, runs)


def compare(
    root: Path,
    s3: S3Server,
    images: list[tuple[bytes, np.ndarray, bytes]],
    readers: list[str],
    runs: Iterable[tuple[int, int, str]],
) -> None:
    """Print a table for each run: samples, processes, what comes out."""
    bucket = s3.make_bucket("bench")
    written: set[str] = set()

    def place(name: str, part: int, count: int) -> str:
        """Write a data set in the reader's format once; returns its URL."""
        url = f"{bucket}/{name.split(',')[0]}/{count}-{part}"
        if url not in written:
            folder = _made(root, "staging")
            samples = [(f"{i:06d}", *images[i % DISTINCT]) for i in range(count)]
            READERS[name].write(samples, folder)
            upload(folder, url, s3.endpoint)
            shutil.rmtree(folder)
            written.add(url)
        return url

    for count, parts, output in runs:
        print(f"\n{count} samples, {parts} processes, {output}")
        print(f"{'':22}samples/s  CPU ms  first ms  memory MB  disk MB  of limit")
        limit = None
        for name in readers:
            urls = [place(name, part, count // parts) for part in range(parts)]
            warm_url = place(name, 0, WARM)
            try:
                result = run(name, urls, warm_url, s3.endpoint, output == "decoded")
            except PeerDiedError as error:  # now and then, of its shared memory: the others go on
                if name not in MODULES:
                    raise
                print(error, flush=True)
                continue
            assert result["count"] == count // parts * parts, result
            limit = result["cpu"] if name == "limit" else limit
            share = f"{limit / result['cpu']:10.0%}" if limit else ""
            print(
                f"{name:22}{result['rate']:9.0f}{result['cpu']:8.2f}{result['first']:10.0f}"
                f"{result['memory']:11.0f}{result['disk']:9.0f}{share}",
                flush=True,
            )


def _made(root: str | Path, name: str) -> Path:
    folder = Path(root, name)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
