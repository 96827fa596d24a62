"""DeepSpeed student, EMA teacher, one optimiser step over several loss terms.

Invariant: a step does what plain PyTorch does with the whole global batch in one process, for
every ZeRO stage. Three traps are handled here and nowhere else: DeepSpeed clips gradients unless
told otherwise; several backwards before one step are wrong for stages 1 and 2 unless their
reduction is coalesced; flat ZeRO partitions feed zeros to parameters that have no gradient.
"""

import importlib
import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.config import EngineConfig
from cluster.deepspeed_config import ZERO_3, deepspeed_config
from cluster.hardware import keep_freed_memory
from cluster.loss_scale import LossScale
from cluster.partitions import held_weights
from sepico.config import OptimizationConfig
from sepico.optimizer import PausableAdamW, parameter_groups
from sepico.schedule import learning_rate
from sepico.teacher import Teacher

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed reports every import and step on stdout of every rank unless told otherwise.
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed


def adopt_process_group() -> None:
    """Let DeepSpeed use the process group that exists."""
    # DeepSpeed would compile a shared-memory kernel here: minutes, and a compiler at hand.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # It would load torch's compiler for its Muon optimiser alone: 4 CPU-s in every worker.
    importlib.import_module("deepspeed.runtime.compiler").compile = lambda: (
        lambda function: function
    )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    if dist.get_backend() == "gloo":
        deepspeed.comm.comm.cdb.all_gather_function = _gather_by_broadcasts


class _Works(list):
    """What is under way; DeepSpeed waits for it as for one."""

    def wait(self) -> None:
        for work in self:
            work.wait()


def _gather_by_broadcasts(
    *, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool
) -> _Works:
    """All-gather, at four times the speed of gloo's own."""
    parts = output_tensor.chunk(dist.get_world_size(group))
    parts[dist.get_rank(group)].copy_(input_tensor)
    works = _Works(
        dist.broadcast(part, group_src=rank, group=group, async_op=True)
        for rank, part in enumerate(parts)
    )
    if not async_op:
        works.wait()
    return works


def set_up_process(cpus: int) -> torch.device:
    """Threads, allocator and process group of a worker of Ray Train; returns its device."""
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # "fp32" is float32, as on CPUs
    torch.set_num_threads(cpus)
    keep_freed_memory()
    adopt_process_group()
    return device


class DivergenceError(FloatingPointError):
    """A gradient or loss is NaN or infinite; the optimiser has not moved. Raised by all ranks."""


class Engine:
    """The student under DeepSpeed. Call it like the network; `step` takes an iterator of terms."""

    def __init__(
        self,
        network: nn.Module,
        config: EngineConfig,
        optimization: OptimizationConfig,
        *,
        projection_start: int,
    ) -> None:
        self.stage = config.zero_stage
        self.optimization = optimization
        self.projection_start = projection_start
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.gradient_norm = math.nan  # of the latest step, over all parameters and ranks
        groups = parameter_groups(network, optimization)
        optimizer = PausableAdamW(groups, lr=optimization.lr, betas=optimization.betas, fused=True)
        self.module, _, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(config, optimization, dist.get_world_size()),
            dist_init_required=False,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.module(*args, **kwargs)

    def step(self, terms: Iterable[Tensor], step: int) -> None:
        """Backward of each term as it comes, then the optimiser step of 0-based step `step`.

        Raises DivergenceError before the optimiser moves if a term or a gradient is not finite on
        any rank. Under fp16 a gradient that overflows by its loss scale alone leaves the step out.
        """
        self._set_rates(step)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        if self.stage:
            self.module.optimizer.loss_scale = scale  # its backward multiplies, its step divides
        else:  # stage 0 has no coalescing: accumulate locally, reduce once below
            self.module.set_gradient_accumulation_boundary(False)
        finite = True
        with self.module.coalesce_grad_reduction() if self.stage else nullcontext():
            try:
                for term in terms:
                    # A loss that is not finite makes the gradient so: its norm tells all ranks.
                    finite = term.detach().isfinite() & finite
                    poisoned = term * torch.where(finite, 1.0, math.nan)
                    self.module.backward(poisoned if self.stage else poisoned * scale)
            except BaseException:
                # Leaving the block reduces gradients with all ranks, who are elsewhere: none are
                # left, or this rank would wait with its error untold.
                self.module.zero_grad()
                raise
        if self.stage:
            self.module.step()  # leaves everything as it is where the global norm is not finite
            overflow = self.module.optimizer.overflow
            self.gradient_norm = math.nan if overflow else float(self.module.get_global_grad_norm())
        else:
            overflow = self._step_replicated(scale)
        if overflow and (scale == 1 or not self._everywhere(finite)):
            raise DivergenceError(f"the gradient of step {step} is not finite")
        if self.loss_scale:
            self.loss_scale.update(overflow=overflow)

    def _step_replicated(self, scale: float) -> bool:
        """Reduce the gradients, and step if they are finite; returns whether they are not."""
        self.module.set_gradient_accumulation_boundary(True)
        self.module.allreduce_gradients()
        gradients = [p.grad for p in self.module.module.parameters() if p.grad is not None]
        if scale != 1:
            torch._foreach_div_(gradients, scale)
        self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(self.gradient_norm):
            self.module.step()
            return False
        self.gradient_norm = math.nan
        self.module.optimizer.zero_grad()
        return True

    @staticmethod
    def _everywhere(finite: Tensor) -> bool:
        everywhere = finite.float()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere)

    def _set_rates(self, step: int) -> None:
        rate = learning_rate(step, self.optimization)
        for group in self.module.optimizer.param_groups:
            group["paused"] = group["name"].startswith("projection") and (
                step < self.projection_start
            )
            group["lr"] = 0.0 if group["paused"] else rate * group["multiplier"]

    def update_teacher(self, teacher: Teacher, alpha: float) -> None:
        """EMA of what this rank holds: under stage 3 shard by shard, without communication."""
        teacher.update(held_weights(self.module.module), alpha)
        if self.stage == 3 and self.module.device.type == "cuda":
            # ZeRO-3 gathers the teacher in a stream of its own, which does not wait for this one.
            torch.cuda.current_stream().synchronize()


def shard_teacher(teacher: Teacher) -> None:
    """Leave each rank its ZeRO-3 shard of the teacher, gathered layer by layer in its passes."""
    world_size = dist.get_world_size()
    deepspeed.initialize(
        model=teacher.network,
        config={
            "train_batch_size": world_size,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": ZERO_3,
            "steps_per_print": 1_000_000_000,
        },
        dist_init_required=False,
    )
    teacher.weights = held_weights(teacher.network)
