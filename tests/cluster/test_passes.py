"""Several passes a step are refused where they would not give the numbers of one."""

import pytest

from cluster.config import EngineConfig, TrainConfig, WorkerRange
from sepico.config import ContrastConfig, OptimizationConfig
from sepico.step import AdaptationStep


def config(
    batch_norm: str, workers: int | WorkerRange, regularizer_weight: float = 0.0
) -> TrainConfig:
    return TrainConfig(
        workers=workers,
        contrast=ContrastConfig(regularizer_weight=regularizer_weight),
        engine=EngineConfig(batch_norm=batch_norm),
        optimization=OptimizationConfig(global_batch=8, micro_batch=1),
    )


@pytest.mark.parametrize("batch_norm", ["sync", "local"])
def test_batch_norm_over_passes_must_not_depend_on_an_elastic_group(batch_norm):
    with pytest.raises(ValueError, match=r"micro_batch 1: .* engine\.batch_norm to frozen"):
        config(batch_norm, WorkerRange(2, 8))
    config(batch_norm, 2)
    config("frozen", WorkerRange(2, 8))


def test_the_regularizer_needs_a_step_of_one_pass():
    with pytest.raises(ValueError, match=r"4 passes.*contrast\.regularizer_weight"):
        config("frozen", 2, regularizer_weight=1.0)
    config("frozen", 8, regularizer_weight=1.0)


def test_a_step_without_a_cluster_refuses_it_too():
    of_eight = config("frozen", 8, regularizer_weight=1.0)
    with pytest.raises(ValueError, match=r"8 passes.*contrast\.regularizer_weight"):
        AdaptationStep(of_eight, lambda images: images, teacher=None, contrast=None)
