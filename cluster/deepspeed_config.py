"""DeepSpeed's own configuration: what ours says, and what a user's JSON adds to it."""

import json
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig
from sepico.config import OptimizationConfig

# Gradients reduced at a time. DeepSpeed would hold a buffer of 500 million, 2 GB.
BUCKET_ELEMENTS = 25_000_000
# A parameter kept whole on every rank would not see what is written to its shard.
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}

# What of ours decides a key of DeepSpeed's.
DECIDED_BY = {
    "train_batch_size": "optimization.global_batch",
    "train_micro_batch_size_per_gpu": "optimization.global_batch and workers",
    "gradient_accumulation_steps": "the engine, which reduces once a step",
    "gradient_clipping": "the method, which does not clip",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.stage3_param_persistence_threshold": "the sharded teacher",
    "zero_optimization.param_persistence_threshold": "the sharded teacher",
    "zero_optimization.offload_param": "the sharded teacher and a resume",
    "zero_optimization.cpu_offload_param": "the sharded teacher and a resume",
    "zero_optimization.zero_hpz_partition_size": "the sharded teacher and a resume",
    "zero_allow_untested_optimizer": "the engine's AdamW",
    "zero_force_ds_cpu_optimizer": "the engine's AdamW",
    "optimizer": "optimization",
    "scheduler": "optimization",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
}
# What a user may set besides: nothing here changes what is computed.
FREE = {
    "zero_optimization", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "flops_profiler", "comms_logger", "aio",
}  # fmt: skip


def deepspeed_config(
    config: EngineConfig, optimization: OptimizationConfig, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's dictionary: ours, with the keys of `engine.deepspeed` that ours leaves open.

    Raises ValueError, in one line, for a key that is unknown or contradicts ours.
    """
    zero = {
        **(ZERO_3 if config.zero_stage == 3 else {"stage": config.zero_stage}),
        "reduce_bucket_size": BUCKET_ELEMENTS,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours = {
        "train_batch_size": optimization.global_batch,
        "train_micro_batch_size_per_gpu": optimization.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    merged = _merge(ours, json.loads(config.deepspeed), "") if config.deepspeed else ours
    # DeepSpeed never sees the data and wants equal shares, which an elastic group may not have.
    return merged | {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1}


def read_deepspeed(value: str) -> str:
    """`engine.deepspeed` as JSON text, read where it is the path of a file. Raises ValueError."""
    if not value:
        return ""
    inline = value.lstrip().startswith("{")
    if not inline and not Path(value).is_file():
        raise ValueError(f"engine.deepspeed {value}: no such file; give a JSON file or JSON text")
    text = value if inline else Path(value).read_text()
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise ValueError(f"engine.deepspeed {value} is no JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"engine.deepspeed {value} must be a JSON object")
    return json.dumps(loaded)


def _merge(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{prefix}{key}"
        if name in DECIDED_BY:
            if value != "auto" and (key not in ours or value != ours[key]):
                raise ValueError(
                    f"engine.deepspeed: {name} = {json.dumps(value)} contradicts "
                    f"{json.dumps(ours.get(key))}, decided by {DECIDED_BY[name]}: remove it there"
                )
        elif not prefix and key not in FREE:
            known = ", ".join(sorted(FREE))
            raise ValueError(f"engine.deepspeed: unknown key {name}; it may set {known}")
        elif key == "zero_optimization":
            _check_zero(value)
            merged[key] = _merge(ours[key], value, f"{key}.")
        else:
            merged[key] = value
    return merged


def _check_zero(section: Any) -> None:
    # Only here, and only for who gives a JSON: the import takes seconds.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ValueError(f"engine.deepspeed: {where}: {first['msg']}") from None
