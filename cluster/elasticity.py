"""How a group of workers follows the cluster's size: right after a checkpoint, by what is of use.

Ray's own policy ends the group as soon as it sees room for more workers, and the steps since the
last checkpoint are lost: pods that come one by one would keep a run from ever writing one.
"""

import math
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

from cluster.config import useful_workers


class ResizeAfterCheckpoint(ElasticScalingPolicy):
    """Ray's policy, whose resizes wait for a checkpoint that `progress`, a ProgressActor, asks the
    workers for, and whose groups have no worker that makes no step faster."""

    def __init__(
        self, scaling_config: ray.train.ScalingConfig, progress: Any, global_batch: int
    ) -> None:
        super().__init__(scaling_config)
        self._progress, self._global_batch = progress, global_batch
        self._saved: ray.ObjectRef | None = None  # ready once the checkpoint is there

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._saved = None  # of the group before
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, *group: Any, **named: Any) -> ScalingDecision:
        if self._saved is not None:
            self._maybe_send_resource_request()  # Ray forgets the group that does not repeat it
            if not ray.wait([self._saved], timeout=0)[0]:
                return NoopDecision()
            self._latest_monitor_time = -math.inf  # the cluster may have changed again: look now
        decision = super().make_decision_for_running_worker_group(*group, **named)
        saved, self._saved = self._saved, None
        if saved is None and not isinstance(decision, NoopDecision):
            self._saved = self._progress.save_checkpoint.remote()
            return NoopDecision()
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        if possible <= self.scaling_config.min_workers:
            return possible
        return useful_workers(possible, self._global_batch, self.scaling_config.min_workers)
