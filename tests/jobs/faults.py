"""A training job that meets a fault: `python -m tests.jobs.faults FAULT FOLDER --option value ...`.

Everything is what `python -m jobs.train` runs, except that one place in the code of rank 1 ends or
stops its process, once, in step AT_STEP or later. FOLDER/fired holds the process's id from just
before; FOLDER/recovered appears when its successor has done its first step.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster import training
from cluster.config import TrainConfig
from jobs.command_line import run
from jobs.train import main

AT_STEP = 4


def train_worker(payload: dict[str, Any]) -> Any:
    """The worker of `cluster.worker`, on rank 1 with the fault in it."""
    from cluster import worker

    fault, folder = payload.pop("fault")
    if dist.get_rank() == 1:
        _Fault(Path(folder)).put_into(fault)
    return worker.train_worker(payload)


class _Fault:
    def __init__(self, folder: Path) -> None:
        self.fired, self.recovered = folder / "fired", folder / "recovered"
        self.step = -1

    def put_into(self, fault: str) -> None:
        from cluster.engine import Engine
        from cluster.storage import Storage
        from sepico.network import Segmentor
        from sepico.step import AdaptationStep

        _wrap(AdaptationStep, "terms", self._count_steps)
        _wrap(Engine, "step", self._note_recovery)
        places = {
            "forward": (Segmentor, "forward", self._kill_in_forward),
            "backward": (Segmentor, "forward", self._kill_in_backward),
            "all-reduce": (dist, "all_reduce", self._kill_in_all_reduce),
            "checkpoint": (Storage, "put", self._kill_in_write),
            "denied": (Storage, "put", self._deny),
            "hang": (Segmentor, "forward", self._stop),
            "node": (Segmentor, "forward", self._kill_node),
        }
        _wrap(*places[fault])

    def _count_steps(self, original: Callable, *args: Any, **options: Any) -> Any:
        self.step = args[-1]
        return original(*args, **options)

    def _note_recovery(self, original: Callable, *args: Any) -> None:
        original(*args)
        if self.fired.exists() and not self.recovered.exists():
            self.recovered.touch()

    def _fire(self) -> bool:
        if self.step < AT_STEP or self.fired.exists():
            return False
        self.fired.write_text(str(os.getpid()))
        return True

    def _kill_in_forward(self, original: Callable, *args: Any, **options: Any) -> Any:
        if self._fire():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    def _kill_in_backward(self, original: Callable, *args: Any, **options: Any) -> Any:
        logits, projections = original(*args, **options)
        if logits is not None and logits.requires_grad and self._fire():
            logits.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return logits, projections

    def _kill_in_all_reduce(self, original: Callable, *args: Any, **options: Any) -> Any:
        if self._fire():
            original(*args, **{**options, "async_op": True})
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    def _kill_in_write(self, original: Callable, storage: Any, key: str, data: bytes) -> None:
        if key.startswith("checkpoints/") and self._fire():
            # The kernel ends a process that writes beyond its limit: here, in mid-file. Python
            # ignores that signal, and lets only the main thread change it.
            ctypes.CDLL(None).signal(int(signal.SIGXFSZ), int(signal.SIG_DFL))
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, -1))
        original(storage, key, data)

    def _deny(self, original: Callable, storage: Any, key: str, data: bytes) -> None:
        from cluster.storage import AccessDeniedError

        if self.fired.exists() or (key.startswith("checkpoints/") and self._fire()):
            raise AccessDeniedError(f"{key}: access denied")
        original(storage, key, data)

    def _stop(self, original: Callable, *args: Any, **options: Any) -> Any:
        if self._fire():
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **options)

    def _kill_node(self, original: Callable, *args: Any, **options: Any) -> Any:
        if self._fire():
            os.kill(os.getppid(), signal.SIGKILL)  # the raylet; without it all of the node ends
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)


def _wrap(owner: Any, name: str, around: Callable) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: around(original, *args, **options))


if __name__ == "__main__":
    fault = (sys.argv.pop(1), sys.argv.pop(1))
    launch = training.launch
    training.launch = lambda _, payload, **options: launch(
        "tests.jobs.faults:train_worker", {**payload, "fault": fault}, **options
    )
    run(main, TrainConfig)
