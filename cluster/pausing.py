"""A run that trains in a thread and pauses, with its workers, for the caller to look at it."""

import threading
import time
from concurrent.futures import Future

import ray

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.lease import LeaseError
from cluster.progress import start_progress
from cluster.storage import open_storage
from cluster.training import Pauses, train

POLL_S = 2


class PausingTraining:
    """Trains a run to the last of `steps`, and waits at each of the others."""

    def __init__(self, config: TrainConfig, steps: list[int]) -> None:
        self._config, self._until = config, steps[-1]
        self._pauses = Pauses(tuple(steps[:-1]), start_progress())
        self._seconds: Future[float] = Future()
        self._began = time.monotonic()
        # A daemon, and no pool, whose threads would keep the process from its end.
        threading.Thread(target=self._train, daemon=True).start()

    def go_on(self, step: int) -> None:
        """Return once the run is at a step, ready to train on. Raises what `train` does."""
        progress = self._pauses.progress
        ray.get(progress.allow.remote(step))
        ray.get(progress.arrived.remote(step))
        if self._seconds.done():
            self._seconds.result()

    def end(self) -> None:
        """End the run at its pause; returns when its workers have ended."""
        ray.get(self._pauses.progress.stop.remote())
        self._seconds.exception()

    @property
    def worker_seconds(self) -> float:
        """From asking for workers to their end, or to now, times their number."""
        if self._seconds.done() and not self._seconds.exception():
            return self._seconds.result()
        return (time.monotonic() - self._began) * self._config.worker_range.max

    def _train(self) -> None:
        try:
            self._seconds.set_result(train_alone(self._config, self._until, self._pauses))
        except BaseException as error:
            self._seconds.set_exception(error)
        ray.get(self._pauses.progress.arrive.remote(self._until))


def train_alone(config: TrainConfig, until: int, pauses: Pauses | None = None) -> float:
    """Train a run up to a step, or wait for another trial that does; returns its worker-seconds.

    Raises what `train` does, but no LeaseError.
    """
    run = open_storage(config.run, config.storage)
    while True:
        done = list_checkpoints(run)
        if done and done[-1].step >= until:
            return 0.0
        began = time.monotonic()
        try:
            train(config, until, pauses)
            return (time.monotonic() - began) * config.worker_range.max
        except LeaseError:
            time.sleep(POLL_S)
