"""A user's DeepSpeed JSON adds to ours and never contradicts it."""

import json
from dataclasses import replace

import pytest

from cluster.config import EngineConfig, TrainConfig, WorkerRange
from cluster.deepspeed_config import deepspeed_config, read_deepspeed
from sepico.config import OptimizationConfig


def merged(theirs: dict, **engine) -> dict:
    config = EngineConfig(deepspeed=read_deepspeed(json.dumps(theirs)), **engine)
    return deepspeed_config(config, OptimizationConfig(global_batch=8), world_size=2)


def test_open_keys_are_added_and_ours_stay():
    config = merged(
        {"comms_logger": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}
    )
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 1


def test_the_same_value_and_auto_are_no_contradiction():
    merged({"train_batch_size": 8, "gradient_clipping": "auto", "zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"train_batch_size": 16}, ["train_batch_size = 16", "8", "optimization.global_batch"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage = 2", "engine.zero_stage"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "does not clip"]),
        ({"bf16": {"enabled": True}}, ["bf16", "engine.precision"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optimization"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "engine.offload_optimizer"]),
        ({"zero_optimization": {"param_persistence_threshold": 9}}, ["threshold", "teacher"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param", "teacher"]),
        ({"zero_optimization": {"cpu_offload_param": True}}, ["cpu_offload_param", "teacher"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, ["zero_hpz", "teacher"]),
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation"]),
        ({"zero_optimization": {"overlap": True}}, ["zero_optimization.overlap"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictions_and_unknown_keys_name_both_sides(theirs, words):
    with pytest.raises(ValueError) as caught:
        merged(theirs)
    for word in words:
        assert word in str(caught.value)


def test_a_contradiction_is_refused_with_the_command_line():
    engine = EngineConfig(deepspeed='{"gradient_clipping": 1.0}')
    with pytest.raises(ValueError, match=r"gradient_clipping = 1\.0 contradicts 0\.0"):
        TrainConfig(engine=engine)


def test_a_share_of_the_batch_must_hold_for_all_of_an_elastic_range():
    engine = EngineConfig(deepspeed='{"train_micro_batch_size_per_gpu": 1}')
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu = 1 contradicts 2"):
        TrainConfig(engine=engine, workers=WorkerRange(1, 2))


def test_a_file_is_read_and_a_missing_or_broken_one_is_named(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"wall_clock_breakdown": true}')
    assert json.loads(read_deepspeed(str(file))) == {"wall_clock_breakdown": True}
    file.write_text("{")
    for value in (str(file), str(tmp_path / "none.json")):
        with pytest.raises(ValueError, match=value):
            read_deepspeed(value)


def test_offload_needs_a_sharded_optimiser():
    with pytest.raises(ValueError, match="offload_optimizer needs"):
        EngineConfig(zero_stage=0, offload_optimizer=True)


@pytest.mark.parametrize(
    ("asked", "workers", "taken"),
    [
        ({"zero_stage": 1}, 1, 0),
        ({"zero_stage": 2}, 1, 0),
        ({"zero_stage": 3}, 1, 3),
        ({"zero_stage": 1}, 2, 1),
        ({"zero_stage": 1, "offload_optimizer": True}, 1, 1),
        ({"zero_stage": 1, "deepspeed": "{}"}, 1, 1),
    ],
)
def test_a_worker_alone_shards_nothing_unless_more_was_asked_for(asked, workers, taken):
    config = EngineConfig(**asked)
    assert config.for_workers(workers) == replace(config, zero_stage=taken)
