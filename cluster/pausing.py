"""A run that trains in a thread and pauses, with its workers, for the caller to look at it."""

import threading
import time

import ray

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.lease import LeaseError
from cluster.progress import start_progress
from cluster.storage import open_storage
from cluster.training import Pauses, train

POLL_S = 2


class PausingTraining:
    """Trains a run to the last of `steps`, and waits at each of the others.

    Where another process trains the run, it waits for what that leaves.
    """

    def __init__(self, config: TrainConfig, steps: list[int]) -> None:
        self._config, self._until = config, steps[-1]
        self._pauses = Pauses(tuple(steps[:-1]), start_progress(config.run))
        self._error: BaseException | None = None
        self._ends = threading.Event()
        self._began: float | None = None
        self._spent = 0.0
        # A daemon, and no pool, whose threads would keep the process from its end.
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def train_to(self, step: int) -> None:
        """Return once the run is at a step, ready to train on. Raises what `train` does."""
        progress = self._pauses.progress
        ray.get(progress.allow.remote(step))
        ray.get(progress.wait_for_arrival.remote(step))
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """End the run at its pause; returns when its workers have ended."""
        self._ends.set()
        ray.get(self._pauses.progress.end_at_pause.remote())
        self._thread.join()

    def take_worker_seconds(self) -> float:
        """From asking for workers to their end, times their number; what was not yet taken."""
        self._count(go_on=True)
        spent, self._spent = self._spent, 0.0
        return spent * self._config.worker_range.max

    def _count(self, *, go_on: bool) -> None:
        began, now = self._began, time.monotonic()
        if began is not None:
            self._spent += now - began
            self._began = now if go_on else None

    def _train(self) -> None:
        run = open_storage(self._config.run, self._config.storage)
        arrive = self._pauses.progress.arrive
        try:
            while not self._ends.is_set():
                done = list_checkpoints(run, skip_damaged=True)
                if done:
                    arrive.remote(done[-1].step)
                if done and done[-1].step >= self._until:
                    break
                self._began = time.monotonic()
                try:
                    train(self._config, self._until, self._pauses)
                    break
                except LeaseError:
                    self._began = None
                    self._ends.wait(POLL_S)
        except BaseException as error:
            self._error = error
        self._count(go_on=False)
        ray.get(arrive.remote(self._until))
