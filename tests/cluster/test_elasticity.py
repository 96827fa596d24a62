"""A running group follows the cluster's size when it has written a checkpoint, not before."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from cluster.elasticity import ResizeAfterCheckpoint
from cluster.progress import start_progress

ONE_WORKER = SimpleNamespace(start_time=0.0, num_workers=1)


@pytest.fixture
def progress(ray_cluster):
    return start_progress("elastic")


@pytest.fixture
def decide(progress):
    """What is decided of a group of one worker on the cluster of two cores."""
    scaling = ScalingConfig(
        num_workers=(1, 2),
        resources_per_worker={"CPU": 1},
        elastic_resize_monitor_interval_s=0,
    )
    policy = ResizeAfterCheckpoint(scaling, progress)
    policy.after_controller_start(SimpleNamespace(run_id="elastic"))
    yield lambda: policy.make_decision_for_running_worker_group(ONE_WORKER, None)
    policy.before_controller_abort()


def wants_checkpoint(progress, step: int) -> bool:
    return ray.get(progress.wants_checkpoint.remote(step))


def test_a_group_grows_when_the_checkpoint_is_there_that_was_asked_for(decide, progress):
    assert not wants_checkpoint(progress, 5)
    assert isinstance(decide(), NoopDecision)
    assert wants_checkpoint(progress, 10)
    assert isinstance(decide(), NoopDecision)
    ray.get(progress.committed.remote(10, "checkpoints/step-00000010-1"))
    deadline = time.monotonic() + 30
    while isinstance(decision := decide(), NoopDecision):
        assert time.monotonic() < deadline
    assert decision.num_workers == 2
    assert not wants_checkpoint(progress, 15)


def test_all_workers_hear_the_same_at_a_step(decide, progress):
    assert not wants_checkpoint(progress, 5)
    decide()
    assert not wants_checkpoint(progress, 5)
    assert wants_checkpoint(progress, 10)


def test_a_checkpoint_that_was_begun_before_does_not_count(decide, progress):
    decide()
    ray.get(progress.committed.remote(10, "checkpoints/step-00000010-1"))
    assert wants_checkpoint(progress, 15)
    ray.get(progress.committed.remote(10, "checkpoints/step-00000010-1"))
    assert isinstance(decide(), NoopDecision)
    assert wants_checkpoint(progress, 20)
    ray.get(progress.committed.remote(20, "checkpoints/step-00000020-1"))
    assert not wants_checkpoint(progress, 25)
