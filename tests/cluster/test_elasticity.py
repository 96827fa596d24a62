"""A group follows the cluster's size, if it runs when it has written a checkpoint, not before.

It grows only as far as more workers make a step faster.
"""

import math
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from cluster.config import TrainConfig, WorkerRange, useful_workers
from cluster.elasticity import ResizeAfterCheckpoint
from cluster.progress import start_progress
from sepico.config import OptimizationConfig

ONE_WORKER = SimpleNamespace(start_time=0.0, num_workers=1)


@pytest.fixture
def progress(ray_cluster):
    return start_progress("elastic")


@contextmanager
def policy_of(progress, workers: tuple[int, int], cores: float, global_batch: int):
    """The policy of a range of workers, of so many cores each, on the cluster of two cores."""
    scaling = ScalingConfig(
        num_workers=workers,
        resources_per_worker={"CPU": cores},
        elastic_resize_monitor_interval_s=0,
    )
    policy = ResizeAfterCheckpoint(scaling, progress, global_batch)
    policy.after_controller_start(SimpleNamespace(run_id="elastic"))
    try:
        yield policy
    finally:
        policy.before_controller_abort()


@pytest.fixture
def decide(progress):
    """What is decided of a group of one worker."""
    with policy_of(progress, (1, 2), 1, 2) as policy:
        yield lambda: policy.make_decision_for_running_worker_group(ONE_WORKER, None)


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


@pytest.mark.parametrize(
    ("workers", "taken"), [((1, 5), 3), ((1, 8), 6), ((4, 5), 4), ((5, 5), 5), ((1, 1), 1)]
)
def test_a_group_has_no_worker_that_makes_no_step_faster(workers, taken, progress):
    with policy_of(progress, workers, 0.25, global_batch=6) as policy:
        deadline = time.monotonic() + 30
        while isinstance(
            decision := policy.make_decision_for_non_running_worker_group(), NoopDecision
        ):
            assert time.monotonic() < deadline
    assert decision.num_workers == taken


@given(st.integers(1, 200), st.data())
def test_useful_workers_are_as_fast_as_all_and_one_less_is_not(global_batch, data):
    available = data.draw(st.integers(1, global_batch))
    useful = useful_workers(available, global_batch)
    share = math.ceil(global_batch / available)
    assert useful <= available
    assert math.ceil(global_batch / useful) == share
    assert useful == 1 or math.ceil(global_batch / (useful - 1)) > share


def test_an_autoscaler_is_not_asked_for_workers_without_use():
    optimization = OptimizationConfig(global_batch=8)
    config = TrainConfig(workers=WorkerRange(2, 7), optimization=optimization)
    assert config.worker_range == WorkerRange(2, 4)
