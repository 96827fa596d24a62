"""What a run leaves to look at: metrics, curves and pictures in its folder, written by rank 0."""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.io import decode_image

from cluster.lease import Lease, LeaseError
from cluster.prometheus import RunGauges
from cluster.run_config import METRICS
from cluster.storage import Storage, StorageError

UPLOAD_S = 10
EVENTS_BYTES = 4 << 20  # of a file of events that is full: it is not uploaded again
METRICS_RATE = 400_000  # bytes a second, on average: metrics are uploaded whole, and only grow


class RunLog:
    """Metrics as JSON lines, TensorBoard events and pictures of one run, written by rank 0.

    Object stores cannot append, so files grow in a local folder. A thread uploads those that have
    changed, every UPLOAD_S or less often as the metrics grow; what the store refuses it calls
    `warn` for once, and tries again. It looks at the lease first and uploads nothing once another
    writer has the run.
    """

    def __init__(
        self, storage: Storage, lease: Lease, start_step: int, warn: Callable[[str], None]
    ) -> None:
        self._storage, self._lease, self._warn = storage, lease, warn
        self._folder = tempfile.TemporaryDirectory(prefix="telemetry-")
        self._lines: list[str] = []
        if storage.exists(METRICS):
            lines = storage.get(METRICS).decode().splitlines()
            # Steps after the checkpoint are taken again: their old lines go.
            self._lines = [line for line in lines if json.loads(line)["step"] < start_step]
        self._writer = SummaryWriter(self._folder.name, purge_step=start_step)
        self._gauges = RunGauges(storage.url)
        self._pictures: dict[str, bytes] = {}
        self._changing = threading.Lock()  # of the four above
        self._sizes: dict[str, int] = {}  # of what is uploaded, by key
        self._fenced: LeaseError | None = None
        self._failing = False
        self._uploading = threading.Lock()  # of the three above
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics after 0-based step `step`.

        A name NAME/CLASS is the metric NAME of one class.
        """
        now = round(time.time(), 3)
        self._gauges.set({"step": step, "diverged": 0, **metrics})
        with self._changing:
            self._lines.append(json.dumps({"step": step, "time": now, **metrics}))
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write `panels/NAME-STEP.png`, and show it in TensorBoard."""
        pixels = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8), mode="RGB")
        with self._changing:
            self._pictures[f"panels/{name}-{step:08d}.png"] = png
            self._writer.add_image(f"panels/{name}", pixels, step)

    def diverged(self) -> None:
        """Publish that the numbers are not finite any more."""
        self._gauges.set({"diverged": 1})

    def poll(self) -> None:
        """Raise LeaseError, without waiting, if an upload found that another writer has the run."""
        if self._fenced is not None:
            raise self._fenced

    def upload(self, *, needed: bool = False) -> None:
        """Upload what has changed; raises what the store, or the local disk, says if `needed`."""
        with self._uploading:
            if self._fenced is not None:
                return
            try:
                self._lease.check(self._storage)
                for key, content in self._changed().items():
                    self._storage.put(key, content)
                    self._sizes[key] = len(content)
                    self._pictures.pop(key, None)
                self._failing = False
            except LeaseError as error:
                self._fenced = error
            except (StorageError, OSError) as error:
                if needed:
                    raise
                if not self._failing:
                    self._warn(f"{error}: metrics and pictures are uploaded later")
                self._failing = True

    def _changed(self) -> dict[str, bytes]:
        """Files whose size is not that of the uploaded ones, by key: they only grow."""
        with self._changing:
            self._writer.flush()
            files = {f"tensorboard/{file.name}": file for file in Path(self._folder.name).iterdir()}
            lines, changed = self._lines.copy(), self._pictures.copy()
            for key, file in files.items():
                if file.stat().st_size != self._sizes.get(key):
                    changed[key] = file.read_bytes()
            if all(file.stat().st_size >= EVENTS_BYTES for file in files.values()):
                self._writer.close()
                self._writer = SummaryWriter(self._folder.name)
        metrics = "".join(f"{line}\n" for line in lines).encode()  # long: training need not wait
        if len(metrics) == self._sizes.get(METRICS):
            return changed
        return {METRICS: metrics, **changed}

    def _run(self) -> None:
        while not self._closed.wait(pause_seconds(self._sizes.get(METRICS, 0))):
            self.upload()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.upload()
        self._writer.close()
        self._folder.cleanup()


def pause_seconds(metrics_bytes: int) -> float:
    """Between two uploads, where the metrics have this size."""
    return max(UPLOAD_S, metrics_bytes / METRICS_RATE)


def used_bytes(device: torch.device) -> int:
    """Memory of this worker: the most that tensors took on its GPU, else what the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
