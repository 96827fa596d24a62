"""What a run leaves to look at: metrics, curves and pictures in its folder, written by rank 0."""

import json
import tempfile
import time
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.io import decode_image

from cluster.prometheus import RunGauges
from cluster.run_config import METRICS
from cluster.storage import Storage


class RunLog:
    """Metrics as JSON lines, TensorBoard events and pictures of one run, written by rank 0.

    Object stores cannot append, so files grow in a local folder and are uploaded whole by `sync`.
    """

    def __init__(self, storage: Storage, start_step: int) -> None:
        self._storage = storage
        self._folder = tempfile.TemporaryDirectory(prefix="telemetry-")
        self._lines: list[str] = []
        if storage.exists(METRICS):
            lines = storage.get(METRICS).decode().splitlines()
            # Steps after the checkpoint are taken again: their old lines go.
            self._lines = [line for line in lines if json.loads(line)["step"] < start_step]
        self._writer = SummaryWriter(self._folder.name, purge_step=start_step)
        self._gauges = RunGauges(PurePosixPath(storage.url).name)
        self._synced = time.monotonic()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics after 0-based step `step`; uploads at most every ten seconds.

        A name NAME/CLASS is the metric NAME of one class.
        """
        now = round(time.time(), 3)
        self._lines.append(json.dumps({"step": step, "time": now, **metrics}))
        self._gauges.set({"step": step, "diverged": 0, **metrics})
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._synced > 10:
            self.sync()

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write `panels/NAME-STEP.png`, and show it in TensorBoard."""
        self._storage.put(f"panels/{name}-{step:08d}.png", png)
        pixels = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8), mode="RGB")
        self._writer.add_image(f"panels/{name}", pixels, step)

    def diverged(self) -> None:
        """Publish that the numbers are not finite any more."""
        self._gauges.set({"diverged": 1})

    def committed(self) -> None:
        """Publish when the newest checkpoint was complete, for alerts."""
        self._gauges.set({"checkpoint_time_seconds": time.time()})

    def sync(self) -> None:
        """Upload metrics and events as they are now."""
        self._writer.flush()
        self._storage.put(METRICS, "".join(f"{line}\n" for line in self._lines).encode())
        for events in Path(self._folder.name).iterdir():
            self._storage.put(f"tensorboard/{events.name}", events.read_bytes())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self._writer.close()
        self._folder.cleanup()


def used_bytes(device: torch.device) -> int:
    """Memory of this worker: the most that tensors took on its GPU, else what the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
