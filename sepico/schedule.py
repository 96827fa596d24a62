"""Learning rate, EMA decay and what is due when, as pure functions of the step."""

import math

from sepico.config import OptimizationConfig


def learning_rate(step: int, config: OptimizationConfig) -> float:
    """Rate of the encoder's parameters before 0-based optimiser step `step`.

    Polynomial decay with linear warm-up, as the authors schedule it:
    r = lr (1 - i/I)^power, times 1 - (1 - i/w)(1 - warmup_ratio) while i < w,
    with i the iteration at the reference batch.
    """
    iteration = step * config.batch_ratio
    rate = config.lr * _batch_scale(config)
    rate *= max(0.0, 1 - iteration / config.iterations) ** config.power
    if iteration < config.warmup:
        rate *= 1 - (1 - iteration / config.warmup) * (1 - config.warmup_ratio)
    return rate


def _batch_scale(config: OptimizationConfig) -> float:
    return {
        "none": 1.0,
        "sqrt": math.sqrt(config.batch_ratio),
        "linear": config.batch_ratio,
    }[config.scale_lr]


def ema_decay(step: int, config: OptimizationConfig, ema_alpha: float) -> float:
    """Decay alpha applied after 0-based step `step`: min(1 - 1/(step + 2), alpha_max).

    alpha_max is stated per reference batch; a step over a larger batch raises it to the power of
    the ratio, so that the teacher's memory spans the same number of samples.
    """
    return min(1 - 1 / (step + 2), ema_alpha**config.batch_ratio)


def contrast_start_step(start_iteration: int, config: OptimizationConfig) -> int:
    """First optimiser step with contrast."""
    return math.ceil(start_iteration / config.batch_ratio)


def is_due(done: int, every: int, config: OptimizationConfig) -> bool:
    """Whether the last of `done` steps passed a multiple of `every` iterations."""
    samples = every * config.reference_batch
    return done * config.global_batch // samples > (done - 1) * config.global_batch // samples
