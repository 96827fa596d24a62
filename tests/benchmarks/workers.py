"""What the benchmarks of several workers share: a run's training on random images, under DeepSpeed
and gloo, in processes that are pinned to a core each. Neither Ray nor data are in it.
"""

import argparse
import copy
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from cluster.activation_checkpointing import checkpoint_activations
from cluster.checkpoints import CheckpointWriter, RunState
from cluster.config import TrainConfig
from cluster.engine import Engine, adopt_process_group, shard_teacher
from cluster.hardware import autocast_dtype, keep_freed_memory
from cluster.lease import Lease
from cluster.storage import StorageConfig, open_storage
from jobs.command_line import parse
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.normalization import set_batch_norm
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher


class Training:
    """What one worker of a run holds; its methods are called by all workers of a group together."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        network = build_segmentor(config.model)
        network.autocast_dtype = autocast_dtype(config.engine.precision)
        self.teacher = Teacher(copy.deepcopy(network))
        for part in (network, self.teacher.network):
            set_batch_norm(part, config.engine.batch_norm)
        if config.engine.activation_checkpointing:
            checkpoint_activations(network.encoder)
        self.contrast = PixelContrast(config, group=dist.new_group())
        self.network = network
        self.engine = Engine(network, config.engine, config.optimization, projection_start=0)
        if self.engine.stage == 3:
            shard_teacher(self.teacher)
        self.terms = AdaptationStep(config, network.normalize, self.teacher, self.contrast)
        self.batch = self._batch()
        self.done = 0
        self.statistics = _TimedAllReduce(self.contrast.group)

    def _batch(self) -> StepBatch:
        """Smooth random images, labels in blocks of 32 pixels; the target is twice as wide."""
        images = self.config.optimization.global_batch // dist.get_world_size()
        height, width = self.config.data.crop_height, self.config.data.crop_width
        source, target = (
            F.interpolate(torch.rand(images, 3, height // 16, w // 16), size=(height, w))
            for w in (width, 2 * width)
        )
        labels = torch.randint(0, self.config.model.num_classes, (images, 1, height, width))
        labels = labels[..., ::32, ::32].repeat_interleave(32, 2).repeat_interleave(32, 3)
        return StepBatch(list(range(images)), source, labels[..., :height, :width], target)

    def steps(self, count: int) -> float:
        """Seconds of `count` steps, from when all workers are there to when all are done."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            self.network.train()
            self.engine.step(self.terms.terms(self.engine, self.batch, self.done), self.done)
            self.engine.update_teacher(self.teacher, 0.999)
            self.done += 1
        dist.barrier()
        return time.perf_counter() - start

    def blocked(self) -> tuple[float, int]:
        """Seconds that steps spent in the statistics' call since the last one, and its bytes."""
        seconds, self.statistics.seconds = self.statistics.seconds, 0.0
        return seconds, self.statistics.bytes

    def save(self, url: str, count: int) -> tuple[float, float]:
        """Seconds of `count` steps that begin with a checkpoint, and of the call that starts it."""
        run = open_storage(url, StorageConfig())
        lease = Lease(1, "benchmark", "token")
        if dist.get_rank() == 0:
            run.put(lease.key, lease.document(0))
        writer = CheckpointWriter(run, lease, keep_last=1, keep_best=0)
        dist.barrier()
        start = time.perf_counter()
        writer.save(self.done, RunState(self.engine, self.teacher, self.contrast), {})
        stalled = time.perf_counter() - start
        seconds = self.steps(count) + stalled
        writer.wait()
        writer.close()
        return seconds, stalled


class _TimedAllReduce:
    """Stands before dist.all_reduce and adds up what the asynchronous call of a group costs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._group, self._all_reduce = group, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not options.get("async_op") or options.get("group") is not self._group:
            return self._all_reduce(tensor, *args, **options)
        self.bytes = tensor.nbytes
        start = time.perf_counter()
        self._work = self._all_reduce(tensor, *args, **options)
        self.seconds += time.perf_counter() - start
        return self

    def wait(self) -> None:
        start = time.perf_counter()
        self._work.wait()
        self.seconds += time.perf_counter() - start


class Group:
    """Workers on `cores`, with `images` of each domain each; closed at the end of a with block."""

    def __init__(
        self,
        config: TrainConfig,
        images: int,
        cores: Sequence[int],
        training: type[Training] = Training,
    ) -> None:
        optimization = replace(config.optimization, global_batch=images * len(cores))
        config = replace(config, optimization=optimization, workers=len(cores))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(len(cores)):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(training, config, rank, cores, self._folder.name, there),
                daemon=True,
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> "Group":
        return self

    def begin(self, method: str, *args: Any) -> None:
        """Have all workers call this method of their Training."""
        for pipe in self._pipes:
            pipe.send((method, *args))

    def end(self) -> list[Any]:
        """What they answered, by rank."""
        return [pipe.recv() for pipe in self._pipes]

    def call(self, method: str, *args: Any) -> list[Any]:
        self.begin(method, *args)
        return self.end()

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(
    training: type[Training],
    config: TrainConfig,
    rank: int,
    cores: Sequence[int],
    folder: str,
    pipe: Any,
) -> None:
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(cores)))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(cores)
    )
    adopt_process_group()
    worker = training(config)
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(worker, call[0])(*call[1:]))
    dist.destroy_process_group()


def configuration(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, TrainConfig]:
    """The script's own flags, and a run's configuration from all others."""
    parser.add_argument("--images", type=int, default=2, help="of each domain, a worker and step")
    arguments, others = parser.parse_known_args()
    config = parse(TrainConfig, others)
    model = replace(config.model, encoder_weights=None, num_classes=config.model.num_classes or 11)
    return arguments, replace(config, model=model, contrast=replace(config.contrast, start=0))


def machine() -> str:
    """The processor, as the figures need it beside them."""
    found = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1:]
    name = found[0].splitlines()[0] if found else platform.machine()
    return f"{os.cpu_count()} cores of {name}, torch {torch.__version__}"
