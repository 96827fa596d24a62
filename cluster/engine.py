"""DeepSpeed student, EMA teacher, one optimiser step over several loss terms.

Invariant: a step does what plain PyTorch does with the whole global batch in one process, for
every ZeRO stage. Three traps are handled here and nowhere else: DeepSpeed clips gradients unless
told otherwise; several backwards before one step are wrong for stages 1 and 2 unless their
reduction is coalesced; flat ZeRO partitions feed zeros to parameters that have no gradient.
"""

import ctypes
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.config import EngineConfig
from sepico.config import OptimizationConfig
from sepico.schedule import learning_rate

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed reports every import and step on stdout of every rank unless told otherwise.
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Dtype of the autocast for a precision, None for none."""
    if precision == "auto":
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capability = torch.backends.cpu.get_cpu_capability()
            fast = "AVX512" in capability and _cpu_has_bf16()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = cpuinfo.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class PausableAdamW(torch.optim.AdamW):
    """AdamW whose groups can wait: a group with `paused` neither moves nor counts the step.

    Plain torch skips a parameter without a gradient; ZeRO's flat partitions hand it zeros
    instead, which would decay it and advance its bias correction. A paused group is stepped with
    rate 0 and its step count put back to 0, so that it starts as if the run began there.
    """

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["paused"]:
                for parameter in group["params"]:
                    if parameter in self.state:
                        self.state[parameter]["step"].zero_()
        return loss


def parameter_groups(network: nn.Module, config: OptimizationConfig) -> list[dict[str, Any]]:
    """AdamW groups: {encoder, head, projection} x {decayed, not decayed}, empty ones left out."""
    norm_types = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    undecayed = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, norm_types)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        part = name.split(".")[0]
        decayed = id(parameter) not in undecayed and not any(
            part in name for part in ("pos_block", "pos_embed")
        )
        group = groups.setdefault(
            (part, decayed),
            {
                "name": f"{part}{'' if decayed else ' (no decay)'}",
                "params": [],
                "multiplier": 1.0 if part == "encoder" else config.head_lr_multiplier,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "paused": False,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def adopt_process_group() -> None:
    """Let DeepSpeed use the process group that exists."""
    # DeepSpeed would compile a shared-memory kernel here: minutes, and a compiler at hand.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that a step frees: it would hand them back to the kernel and fault
    them in again in the next step, 8 % of a step on CPU. Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)  # large blocks come from the heap too, where they can stay


def set_up_process(cpus: int) -> torch.device:
    """Threads, allocator and process group of a worker of Ray Train; returns its device."""
    torch.set_num_threads(cpus)
    keep_freed_memory()
    adopt_process_group()
    return ray.train.torch.get_device()


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
        groups = parameter_groups(network, optimization)
        optimizer = PausableAdamW(groups, lr=optimization.lr, betas=optimization.betas, fused=True)
        self.module, _, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(config, optimization),
            dist_init_required=False,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.module(*args, **kwargs)

    def step(self, terms: Iterable[Tensor], step: int) -> None:
        """Backward of each term as it comes, then the optimiser step of 0-based step `step`.

        Raises FloatingPointError before the optimiser moves if a term is not finite.
        """
        self._set_rates(step)
        if not self.stage:  # stage 0 has no coalescing: accumulate locally, reduce once below
            self.module.set_gradient_accumulation_boundary(False)
        with self.module.coalesce_grad_reduction() if self.stage else nullcontext():
            # Leaving the block reduces gradients with all ranks, so nothing may raise inside it.
            values = []
            for term in terms:
                values.append(term.detach())
                self.module.backward(term)
        if not torch.isfinite(torch.stack(values)).all():
            found = [value.item() for value in values]
            raise FloatingPointError(f"the loss terms of step {step} are {found}: lower the rate")
        if not self.stage:
            self.module.set_gradient_accumulation_boundary(True)
            self.module.allreduce_gradients()
        self.module.step()

    def _set_rates(self, step: int) -> None:
        rate = learning_rate(step, self.optimization)
        for group in self.module.optimizer.param_groups:
            group["paused"] = group["name"].startswith("projection") and (
                step < self.projection_start
            )
            group["lr"] = 0.0 if group["paused"] else rate * group["multiplier"]

    def full_parameters(self) -> Iterator[Tensor]:
        """Float32 parameters in the module's order; a collective under stage 3."""
        for parameter in self.module.module.parameters():
            yield safe_get_full_fp32_param(parameter) if self.stage == 3 else parameter.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Full float32 weights and buffers by name; a collective under stage 3."""
        module = self.module.module
        state = module.state_dict()
        names = (name for name, _ in module.named_parameters())
        state.update(zip(names, self.full_parameters(), strict=True))
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def deepspeed_config(config: EngineConfig, optimization: OptimizationConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for our configuration."""
    world_size = dist.get_world_size()
    return {
        "train_batch_size": optimization.global_batch,
        "train_micro_batch_size_per_gpu": optimization.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
