"""What a process makes of the machine it runs on: the fast dtype, and memory that stays."""

import ctypes
import os

import torch


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Dtype of the autocast for a precision, None for none."""
    if precision == "auto":
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capability = torch.backends.cpu.get_cpu_capability()
            fast = "AVX512" in capability and _cpu_has_bf16()
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = cpuinfo.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that a step frees: it would hand them back to the kernel and fault
    them in again in the next step, 8 % of a step on CPU."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
    _mallopt(trim_threshold, 2**31 - 1)
    _mallopt(mmap_max, 0)  # large blocks come from the heap too, where they can stay


def share_heaps() -> None:
    """Let the threads of this process share two heaps, where it still has few threads: each would
    keep what it freed in one of its own. MALLOC_ARENA_MAX in the environment goes first."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        arena_max = -8  # M_ARENA_MAX
        _mallopt(arena_max, 2)


def _mallopt(parameter: int, value: int) -> None:
    """Other C libraries than glibc are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
