"""What is due after which step, whatever the global batch."""

import pytest

from sepico.config import OptimizationConfig
from sepico.schedule import is_due


def dues(every: int, global_batch: int) -> list[int]:
    optimization = OptimizationConfig(global_batch=global_batch, reference_batch=2, iterations=384)
    return [done for done in range(1, optimization.steps + 1) if is_due(done, every, optimization)]


def test_at_the_reference_batch_an_iteration_is_a_step():
    assert dues(every=150, global_batch=2) == [150, 300]


@pytest.mark.parametrize("global_batch", [1, 2, 3, 8, 64])
def test_a_larger_batch_has_as_many_and_validates_what_it_checkpoints(global_batch):
    checkpoints, validations = dues(48, global_batch), dues(96, global_batch)
    assert (len(checkpoints), len(validations)) == (8, 4)
    assert set(validations) < set(checkpoints)
