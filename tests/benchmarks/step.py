"""One whole training step against the encoder's forward + backward alone.

    python tests/benchmarks/step.py [--network deeplab daformer] [--precision fp32 bf16]

The published DistCL presets with random weights and the contrast running, source and target crops
of 256x256 (the target comes as 256x512), batch 2, one thread. A step is three loss terms with
their backwards, AdamW and the teacher's update, in one process without Ray or DeepSpeed; the
encoder, as segmentation-models-pytorch has it, takes the same source images. Both run alternately
in one process, and the least CPU time of each counts: a shared machine only ever adds to it. The
memory is measured in a process of its own that makes nothing but steps. bf16 is left out on a CPU
without it, where PyTorch multiplies bf16 matrices in a plain loop, many times slower than fp32.
"""

import argparse
import copy
import multiprocessing
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F

from cluster.config import TrainConfig
from cluster.engine import (
    PausableAdamW,
    autocast_dtype,
    keep_freed_memory,
    parameter_groups,
)
from jobs.command_line import parse
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher

PRESETS = {
    "deeplab": "gta2cityscapes_deeplabv2_distcl",
    "daformer": "gta2cityscapes_daformer_distcl",
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
SIDE, BATCH = 256, 2


class Clock:
    """CPU seconds by part; a part inside another one is not counted in both."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class TimedTeacher(Teacher):
    def __init__(self, network, clock: Clock) -> None:
        super().__init__(network)
        self.clock = clock

    def probabilities(self, images):
        name = "crop" if images.shape[-1] == SIDE else "whole target"
        with self.clock.part(f"teacher, {name}"):
            return super().probabilities(images)

    def embeddings(self, images):
        with self.clock.part("teacher, source"):
            return super().embeddings(images)


class Training:
    """Student, teacher and optimiser of a published preset; `step` makes one step."""

    terms = ("source", "target", "mix")

    def __init__(self, network: str, precision: str) -> None:
        config = parse(TrainConfig, ["--config", PRESETS[network]])
        config.model = replace(config.model, encoder_weights=None)
        config.contrast = replace(config.contrast, start=0)
        torch.manual_seed(0)
        self.clock = Clock()
        self.student = build_segmentor(config.model).train()
        self.student.autocast_dtype = DTYPES[precision]
        self.teacher = TimedTeacher(copy.deepcopy(self.student), self.clock)
        self.adaptation = AdaptationStep(
            config, self.student.normalize, self.teacher, PixelContrast(config)
        )
        groups = parameter_groups(self.student, config.optimization)
        self.optimizer = PausableAdamW(groups, lr=1e-6, fused=True)
        self.batch = batch()

    def step(self) -> None:
        with self.clock.part("labels, augmentation, losses"):
            terms = self.adaptation.terms(self._student, self.batch, 0)
            for name, term in zip(self.terms, terms, strict=True):
                with self.clock.part(f"backward, {name}"):
                    term.backward()
            with self.clock.part("optimiser"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            with self.clock.part("teacher's update"):
                self.teacher.update(self.student.parameters(), 0.999)

    def _student(self, images, **parts):
        name = {(): "source", ("logits",): "target", ("projections",): "mix"}
        with self.clock.part(f"forward, {name[tuple(k for k in parts if not parts[k])]}"):
            return self.student(images, **parts)


class Encoder:
    """The encoder of a published preset; `step` is its forward and backward on the source."""

    def __init__(self, network: str, precision: str) -> None:
        model = parse(TrainConfig, ["--config", PRESETS[network]]).model
        self.encoder = smp.encoders.get_encoder(
            model.encoder, weights=None, output_stride=model.output_stride
        ).train()
        self.dtype = DTYPES[precision]
        images = batch().source_image - 0.5
        self.images = images.contiguous(memory_format=torch.channels_last)

    def step(self) -> None:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            last = self.encoder(self.images)[-1]
        torch.autograd.backward(last, torch.ones_like(last))
        self.encoder.zero_grad()


def batch() -> StepBatch:
    """Smooth random images, labels in blocks of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    source, target = (
        F.interpolate(torch.rand(BATCH, 3, 16, width, generator=generator), scale_factor=16)
        for width in (16, 32)
    )
    labels = torch.randint(0, 19, (BATCH, 1, SIDE // 32, SIDE // 32), generator=generator)
    labels = labels.repeat_interleave(32, 2).repeat_interleave(32, 3)
    return StepBatch([1, 2], source, labels, target)


def cpu_seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure_time(network: str, precision: str, repeats: int, queue) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    training = Training(network, precision)
    encoder = Encoder(network, precision)
    training.step()  # what is made once: the optimiser's state, kernels
    encoder.step()
    steps, encoders = [], []
    for _ in range(repeats):
        encoders.append(cpu_seconds(encoder.step))
        training.clock.seconds.clear()
        total = cpu_seconds(training.step)
        steps.append((total, dict(training.clock.seconds)))
    queue.put((min(encoders), *min(steps, key=lambda step: step[0])))


def measure_memory(network: str, precision: str, repeats: int, queue) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    before = peak_gib()
    training = Training(network, precision)
    for _ in range(3):
        training.step()
    queue.put((peak_gib(), before))


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def in_own_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=PRESETS, default=list(PRESETS))
    fast = [name for name, dtype in DTYPES.items() if dtype in (None, autocast_dtype("auto"))]
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=fast)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()} with {capability}, torch {torch.__version__}, 1 thread")
    for network in arguments.network:
        for precision in arguments.precision:
            case = network, precision, arguments.repeats
            encoder, step, parts = in_own_process(measure_time, *case)
            print(
                f"\n{network} {precision}: step {step:.2f} CPU-s = {step / encoder:.2f} x encoder "
                f"({encoder:.2f} CPU-s)"
            )
            for name, seconds in parts.items():
                print(f"  {name:<30}{seconds:>7.2f} s{seconds / encoder:>7.2f} x", flush=True)
            peak, before = in_own_process(measure_memory, *case)
            print(f"  peak {peak:.2f} GiB, {before:.2f} of it before the network", flush=True)


if __name__ == "__main__":
    main()
