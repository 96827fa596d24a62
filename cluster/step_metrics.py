"""What a step of all workers together shows: their means, per class too, and the rate."""

import time
from typing import Any

import torch
import torch.distributed as dist

from cluster import read_metrics
from cluster.config import TrainConfig
from cluster.engine import Engine
from cluster.loader import TrainLoader
from cluster.telemetry import RunLog, used_bytes
from sepico.schedule import learning_rate
from sepico.step import AdaptationStep


class StepMetrics:
    """Averages what the workers measured; rank 0 writes it down and tells the driver.

    `log` is None on the other ranks, `progress` is a ProgressActor, `start` the first step.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: AdaptationStep,
        engine: Engine,
        loader: TrainLoader,
        log: RunLog | None,
        progress: Any,
        start: int,
    ) -> None:
        self._config, self._step, self._engine = config, step, engine
        self._loader, self._log, self._progress = loader, log, progress
        self._timer = _Timer(start)

    def show(self, step: int) -> None:
        """Show 0-based step `step`. A collective."""
        names = sorted(self._step.metrics)
        metrics = self._means(names) | self._class_means()
        if "pseudo_label_right" in metrics:
            known = metrics.pop("pseudo_label_known")
            metrics["pseudo_label_accuracy"] = metrics.pop("pseudo_label_right") / max(known, 1e-9)
        optimization = self._config.optimization
        metrics["workers"] = dist.get_world_size()
        metrics["gradient_norm"] = self._engine.gradient_norm
        metrics["learning_rate"] = learning_rate(step, optimization)
        rate = self._timer.steps_per_second(step + 1)
        metrics["images_per_second"] = rate * optimization.global_batch
        device = self._engine.module.device
        sums = torch.tensor(self._loader.metrics.take(), dtype=torch.float64).to(device)
        dist.all_reduce(sums)
        reading = read_metrics.summarize(sums.tolist())
        metrics |= reading
        memory = torch.tensor(used_bytes(device), dtype=torch.float64, device=device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        metrics["memory_bytes"] = memory.item()
        if self._log:
            self._log.log(step, metrics)
            shown = {
                name: f"{metrics[name]:.3f}"
                for name in [*names, "pseudo_label_accuracy"]
                if name in metrics and "regularizer" not in name
            }
            shown["images/s"] = f"{metrics['images_per_second']:.1f}"
            shown |= read_metrics.shown(reading)
            self._progress.update.remote(step + 1, optimization.steps, shown)

    def _means(self, names: list[str]) -> dict[str, float]:
        values = torch.stack([self._step.metrics[name].double() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))

    def _class_means(self) -> dict[str, float]:
        """Means per class over all workers, of the classes that occur: NAME/CLASS."""
        names = sorted(self._step.class_sums)
        if not names:
            return {}
        sums = torch.stack([self._step.class_sums[name] for name in names])
        dist.all_reduce(sums)
        classes = self._loader.source.taxonomy.names
        return {
            f"{name}/{label}": total / count
            for name, (totals, counts) in zip(names, sums.tolist(), strict=True)
            for label, total, count in zip(classes, totals, counts, strict=True)
            if count
        }


class _Timer:
    """Steps per second since the previous call."""

    def __init__(self, step: int) -> None:
        self._time = time.monotonic()
        self._step = step

    def steps_per_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._time, self._step = now, step
        return rate
