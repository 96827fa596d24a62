"""One training step on CUDA with NCCL in bf16 and fp16; skipped where there is no GPU."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.cluster.engine_ranks import BATCH, build, full_state, global_batch, method_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_distcl_step_moves_student_and_teacher(world_size, precision, tmp_path):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    arguments = (world_size, str(tmp_path), precision)
    torch.multiprocessing.spawn(take_step, arguments, nprocs=world_size)


def take_step(rank: int, world_size: int, folder: str, precision: str) -> None:
    """What each process does: the step, and its checks."""
    from cluster.config import EngineConfig
    from cluster.engine import Engine, adopt_process_group, autocast_dtype
    from sepico.normalization import set_batch_norm
    from sepico.schedule import ema_decay
    from sepico.step import AdaptationStep, StepBatch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    adopt_process_group()
    config = method_config("distcl", start=0)
    network, teacher, contrast = build(config, dist.new_group(), device, precision)
    for part in (network, teacher.network):
        set_batch_norm(part, "sync")
    seen = []
    network.encoder.register_forward_hook(
        lambda _, images, features: seen.append((images[0], features[-1].dtype))
    )
    engine_config = EngineConfig(precision=precision)
    engine = Engine(network, engine_config, config.optimization, projection_start=0)
    initial = [full_state(network), full_state(teacher.network)]

    batch = global_batch(0, range(rank, BATCH, world_size))
    tensors = (batch.source_image, batch.source_label, batch.target_image)
    batch = StepBatch(batch.seeds, *(tensor.to(device) for tensor in tensors))
    step = AdaptationStep(config, network.normalize, teacher, contrast)
    network.train()
    engine.step(step.terms(engine, batch, 0), 0)  # refuses terms that are not finite
    decay = ema_decay(0, config.optimization, config.teacher.ema_alpha)
    engine.update_teacher(teacher, decay)

    assert all(torch.isfinite(value) for value in step.metrics.values()), step.metrics
    for old, new in zip(initial, [full_state(network), full_state(teacher.network)], strict=True):
        for part in ("encoder", "head", "projection"):
            weights = [name for name in new if name.startswith(part) and name.endswith("weight")]
            assert any((new[name] != old[name]).any() for name in weights), part
    held = [*teacher.network.parameters(), *contrast.state_dict().values()]
    assert all(tensor.device == device for tensor in held)
    assert contrast.statistics[0].count.sum() > 0
    for images, dtype in seen:
        assert images.device == device and dtype == autocast_dtype(precision)
        assert images.is_contiguous(memory_format=torch.channels_last)
    dist.destroy_process_group()
