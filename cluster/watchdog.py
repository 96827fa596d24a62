"""Ends a worker that makes no progress, so that Ray Train restarts the group from a checkpoint.

A rank that hangs keeps the others waiting in a collective, so they run out of time with it and all
of them leave their stack traces, on stderr and in the run folder:

    stacks/rank-00003-step-00000120.txt

A rank without a file could not write one: its process is stopped, dead, or cut off.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from cluster.storage import Storage, StorageError

FOLDER = "stacks"
# The first rank that exits makes Ray kill the others: they get time to write their traces too.
PATIENCE_S = 5
# When even the thread of the watchdog hangs: C code that keeps the GIL, a store that never answers.
GRACE_S = 30
STDERR = 2  # of the process: sys.stderr may be anything


class Watchdog:
    """Ends this process when no `beat` came for `timeout` seconds. A context manager.

    `progress` is the run's ProgressActor, which shows the ranks that ended at the driver.
    """

    def __init__(self, timeout: float, run: Storage, rank: int, progress: Any) -> None:
        self._timeout, self._run, self._rank, self._progress = timeout, run, rank, progress
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._step = 0

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int | None = None) -> None:
        """Progress was made: start counting anew. `step` names the step that now begins."""
        if step is not None:
            self._step = step
        self._deadline = time.monotonic() + self._timeout
        faulthandler.dump_traceback_later(self._timeout + GRACE_S, exit=True, file=STDERR)

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        traces = (
            f"rank {self._rank} made no progress for {self._timeout} s in step {self._step}\n\n"
            + stack_traces()
        ).encode()
        os.write(STDERR, traces)
        self._progress.hung.remote(self._rank, self._step, f"{self._run.url}/{FOLDER}")
        with suppress(StorageError):
            key = f"{FOLDER}/rank-{self._rank:05d}-step-{self._step:08d}.txt"
            self._run.put(key, traces)
        time.sleep(PATIENCE_S)
        os._exit(1)


def stack_traces() -> str:
    """Where every thread of this process is, by the threads' names."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
