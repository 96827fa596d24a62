"""What test_engine runs in each of its processes: the same steps under DeepSpeed and gloo."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.config import EngineConfig
from sepico.config import (
    AugmentationConfig,
    ContrastConfig,
    MethodConfig,
    ModelConfig,
    OptimizationConfig,
    TeacherConfig,
)
from sepico.network import build_segmentor
from sepico.normalization import set_batch_norm
from sepico.schedule import ema_decay, learning_rate
from sepico.statistics import ClassStatistics
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher

STEPS, START, BATCH, CLASSES = 7, 2, 4, 5


def method_config(method: str = "distcl") -> MethodConfig:
    """A tiny network, a constant rate (a warm-up would hide errors), no dropout."""
    return MethodConfig(
        method=method,
        model=ModelConfig(
            encoder="tu-test_efficientnet",
            encoder_weights=None,
            head_channels=16,
            head_dilations=(1, 2),
            dropout=0.0,
            projection_channels=16,
            num_classes=CLASSES,
        ),
        contrast=ContrastConfig(temperature=0.5, regularizer_weight=0.5, start=START),
        teacher=TeacherConfig(ema_alpha=0.9, threshold=0.3, ignore_top=4, ignore_bottom=0),
        augmentation=AugmentationConfig(),
        optimization=OptimizationConfig(
            iterations=100, global_batch=BATCH, reference_batch=BATCH, lr=1e-4, warmup=0, power=0
        ),
    )


def global_batch(step: int, slots: range) -> StepBatch:
    """The slots of a step, made from the step's number alone."""
    generator = torch.Generator().manual_seed(step)
    source = torch.rand(BATCH, 3, 64, 64, generator=generator)
    label = torch.randint(0, CLASSES, (BATCH, 1, 4, 4), generator=generator)
    target = torch.rand(BATCH, 3, 72, 80, generator=generator)
    mine = list(slots)
    return StepBatch(
        [100 * step + slot for slot in mine],
        source[mine],
        torch.kron(label, torch.ones(16, 16, dtype=torch.int64))[mine],
        target[mine],
    )


def build(config: MethodConfig) -> tuple[torch.nn.Module, Teacher | None, ClassStatistics | None]:
    torch.manual_seed(0)
    adapts = config.method != "source_only"
    network = build_segmentor(config.model, with_projection=adapts)
    teacher = Teacher(copy.deepcopy(network)) if adapts else None
    return network, teacher, ClassStatistics(CLASSES, 16) if adapts else None


def result(network_state: dict, teacher: Teacher | None, statistics: ClassStatistics | None):
    state = {f"student.{name}": value for name, value in network_state.items()}
    if teacher is not None:
        state |= {f"teacher.{name}": v for name, v in teacher.network.state_dict().items()}
        state |= {f"statistics.{name}": v for name, v in statistics.state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items()}


def plain_pytorch(method: str) -> tuple[dict, dict]:
    """Initial state, and the state after STEPS steps of plain PyTorch over the whole batch."""
    from cluster.engine import parameter_groups

    config = method_config(method)
    network, teacher, statistics = build(config)
    initial = result(network.state_dict(), teacher, statistics)
    groups = parameter_groups(network, config.optimization)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=config.optimization.betas)
    step_terms = AdaptationStep(config, network.normalize, teacher, statistics)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimization) * group["multiplier"]
        optimizer.zero_grad()
        for term in step_terms.terms(network.train(), global_batch(step, range(BATCH)), step):
            term.backward()
        optimizer.step()
        if teacher is not None:
            decay = ema_decay(step, config.optimization, config.teacher.ema_alpha)
            teacher.update((p.detach() for p in network.parameters()), decay)
    return initial, result(network.state_dict(), teacher, statistics)


def run_rank(rank: int, world_size: int, folder: str, cases: list[tuple[int, str]]) -> None:
    """Train each case (ZeRO stage, method); rank 0 writes FOLDER/WORLD-STAGE-METHOD.pt."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank,
        world_size=world_size,
    )  # fmt: skip
    from cluster.engine import adopt_process_group

    adopt_process_group()
    group = dist.new_group()
    for stage, method in cases:
        state = _train(stage, method_config(method), rank, world_size, group)
        if rank == 0:
            torch.save(state, Path(folder) / f"{world_size}-{stage}-{method}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _train(stage: int, config: MethodConfig, rank: int, world_size: int, group) -> dict:
    from cluster.engine import Engine

    network, teacher, statistics = build(config)
    set_batch_norm(network, "sync")
    if teacher is not None:
        set_batch_norm(teacher.network, "sync")
    optimization = replace(config.optimization)
    engine = Engine(network, EngineConfig(zero_stage=stage), optimization, projection_start=START)
    terms = AdaptationStep(config, network.normalize, teacher, statistics, group=group)
    slots = range(rank, BATCH, world_size)
    for step in range(STEPS):
        network.train()
        engine.step(terms.terms(engine, global_batch(step, slots), step), step)
        if teacher is not None:
            decay = ema_decay(step, optimization, config.teacher.ema_alpha)
            teacher.update(engine.full_parameters(), decay)
    return result(engine.state_dict(), teacher, statistics)
