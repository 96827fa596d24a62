"""Configuration of a training run: the method's sections, and where and on what it runs."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.data import DataConfig
from cluster.storage import StorageConfig
from sepico.config import BatchNormMode, MethodConfig


@dataclass
class EngineConfig:
    """Where and how the mathematics is executed.

    Attributes:
        zero_stage: DeepSpeed ZeRO stage: 0 replicates, 1 shards optimiser state, 2 gradients too,
            3 parameters too. One worker alone takes 0 for 1 and 2, unless `deepspeed` or
            `offload_optimizer` is given.
        precision: "bf16" is autocast over float32 parameters; "auto" takes it where the hardware
            computes in it. "fp16", for GPUs before Ampere, besides scales the loss.
        batch_norm: Statistics over all workers ("sync"), the running ones ("frozen"), or those of
            each worker ("local", gives up independence of the number of workers).
        offload_optimizer: Keep masters and Adam's moments in host memory and step them there.
        activation_checkpointing: Keep only the inputs of the student's encoder blocks and compute
            the blocks again in the backward: less memory, more time, the same numbers.
        deepspeed: DeepSpeed JSON (a file, or the text) that adds to ours; empty for none. A key
            that contradicts ours is an error.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_norm: BatchNormMode = "sync"
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    deepspeed: str = ""

    def __post_init__(self) -> None:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")

    def for_workers(self, workers: int) -> "EngineConfig":
        """What a group of so many workers runs with.

        One alone has nobody to share with: ZeRO 1 and 2 would only hold its parameters twice, and
        launch more small kernels for each of them.
        """
        asked = self.offload_optimizer or self.deepspeed
        alone = workers == 1 and self.zero_stage in (1, 2) and not asked
        return replace(self, zero_stage=0) if alone else self


@dataclass
class ValidationConfig:
    """Validation inside the training loop.

    Attributes:
        data: URL of a data set of held-out target images; empty for none. With labels mIoU is
            measured on it, without them only how sure the networks are.
        every: Iterations between validations; the last step is always validated.
    """

    data: str = ""
    every: int = 1000

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"validation.every is {self.every}: it must be at least 1")


@dataclass
class WorkerRange:
    """An elastic number of workers: as many as there is room and use for, also in mid-run.

    Attributes:
        min: The run waits until there is room for so many.
        max: It never takes more.
    """

    min: int
    max: int


def useful_workers(available: int, global_batch: int, least: int = 1) -> int:
    """The fewest workers, `least` or more, that are as fast as `available` ones: of equal share.

    All wait for the largest share of the global batch: 8 images are 3, 3 and 2 on three workers,
    which two (4 and 4) would be slower than, and no faster on seven workers than on four.
    """
    return max(least, math.ceil(global_batch / math.ceil(global_batch / available)))


@dataclass
class TrainConfig(MethodConfig):
    """A training run.

    Attributes:
        method: "distcl", "bankcl" and "protocl" adapt to the target domain, contrasting with class
            distributions, a memory bank or prototypes; "source_only" is the baseline without it.
        run: Name (a folder below `runs`) or URL of the run. An existing run is continued. Empty
            makes a name from method and time.
        runs: URL of the folder that holds runs given by name.
        fork: URL of a checkpoint (RUN/checkpoints/step-...) of another run to begin from; its
            configuration may differ in what acts from the contrast's start on: method, and of
            contrast temperature, weights and (shorter) bank_length.
        workers: Ray Train workers; one GPU each where the cluster has GPUs. A number, or an
            elastic range {min: 2, max: 8}: as many as there is room for, less those that would make
            no step faster (with room for 5 to 7, a global batch of 8 takes 4).
        cpus_per_worker: CPU cores and compute threads of a worker; 0 shares the cluster's out, as
            it is when the run starts.
        placement_timeout: Seconds to wait for a cluster that grows to hold the workers. If it
            starts empty, its first node decides whether they train on GPUs.
        max_failures: Restarts from the last checkpoint after a lost worker.
        hang_timeout: Seconds without a step (or an image of a validation) after which a worker
            counts as hanging: it writes its stack traces, and the group is restarted. Ray itself
            replaces a stopped process after 600, without traces of the others.
        seed: Seed of data, augmentation and initial weights.
        log_every: Steps between lines of metrics.
        checkpoint_every: Iterations between checkpoints, at `optimization.reference_batch` images.
        keep_last: Newest checkpoints that are kept.
        keep_best: Checkpoints kept besides for the student's mIoU; a checkpoint has one if its
            step is validated, so make `validation.every` a multiple of `checkpoint_every`.
        fall_back: If the newest checkpoint has a missing or damaged file, delete it and continue
            from the one before; otherwise such a file is an error.
        panel_every: Steps between pictures of a step.
        profile: Write a torch profiler trace of a few steps, and the share of each part of them,
            into the run's `profile/`.
    """

    run: str = ""
    runs: str = "runs"
    fork: str = ""
    workers: int | WorkerRange = 1
    cpus_per_worker: int = 0
    placement_timeout: int = 0
    max_failures: int = 3
    hang_timeout: int = 500
    seed: int = 76
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    fall_back: bool = False
    panel_every: int = 500
    profile: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.workers, int):
            if self.workers < 1:
                raise ValueError(f"workers is {self.workers}: it must be at least 1")
            if self.optimization.global_batch % self.workers:
                raise ValueError(
                    f"optimization.global_batch {self.optimization.global_batch} is not divisible "
                    f"by workers {self.workers}: choose a multiple"
                )
        elif not 1 <= self.workers.min <= self.workers.max <= self.optimization.global_batch:
            raise ValueError(
                f"workers is {self.workers.min} to {self.workers.max}: it must lie within 1 and "
                f"optimization.global_batch {self.optimization.global_batch}"
            )
        passes = self.optimization.passes(self.worker_range.min)
        self.check_passes(self.worker_range.min)
        elastic = self.worker_range.min < self.worker_range.max
        if passes > 1 and elastic and self.engine.batch_norm != "frozen":
            raise ValueError(
                f"optimization.micro_batch {self.optimization.micro_batch}: batch-norm sees one "
                "pass of all workers at a time, so its numbers would change with theirs: set "
                "engine.batch_norm to frozen, workers to one number, or micro_batch to 0"
            )
        if self.engine.deepspeed:
            # Which needs EngineConfig.
            from cluster.deepspeed_config import deepspeed_config, read_deepspeed

            # Merged once for the contradictions it refuses.
            engine = replace(self.engine, deepspeed=read_deepspeed(self.engine.deepspeed))
            for workers in (self.worker_range.min, self.worker_range.max):
                deepspeed_config(engine, self.optimization, workers)
        positive = ("hang_timeout", "log_every", "checkpoint_every", "keep_last", "panel_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("cpus_per_worker", "seed", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")

    @property
    def worker_range(self) -> WorkerRange:
        """The range of `workers` that are of use, of one number where it is fixed."""
        if isinstance(self.workers, int):
            return WorkerRange(self.workers, self.workers)
        fewest, most = self.workers.min, self.workers.max
        return WorkerRange(fewest, useful_workers(most, self.optimization.global_batch, fewest))
