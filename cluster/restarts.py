"""Why a group of workers failed, and the event that shows it where Ray starts the group again."""

from typing import Any

import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import RestartingState, TrainControllerState


def cause_of(error: ray.train.TrainingFailedError) -> Exception:
    """What one worker raised, a ValueError if there is one: the others fail with it, in their
    collectives. The error itself where no worker has failed."""
    failures = getattr(error, "worker_failures", {}).values()
    # Ray wraps what a worker raised.
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    return next((cause for cause in causes if isinstance(cause, ValueError)), [*causes, error][0])


class ShowRestarts(ControllerCallback):
    """Tells the run's ProgressActor of every new start of the workers after a failure."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, RestartingState):
            cause = cause_of(current_state.training_failed_error)
            message = " ".join(str(cause).split()) or type(cause).__name__
            self._progress.event.remote("warning", "restarted", {"message": message})
