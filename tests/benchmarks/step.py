"""One whole training step against the encoder's forward + backward alone.

    python tests/benchmarks/step.py [--network deeplab daformer] [--precision fp32 bf16] [--side N]

The published DistCL presets with random weights and the contrast running, source and target crops
of 256x256 (the target comes as 256x512), batch 2. A step is three loss terms with their backwards,
AdamW and the teacher's update, in one process without Ray or DeepSpeed; the encoder, as
segmentation-models-pytorch has it, takes the same source images. Both run alternately in one
process, and the least time of each counts: a shared machine only ever adds to it. The parts are
those of one more step, on a GPU a slower one, which waits for each. The memory is measured in a
process of its own that makes nothing but steps.

On a GPU, where there is one: its time from step to step, and the most bytes that its tensors took.
Else the CPU time of one thread, and the process' largest resident memory; bf16 is left out on a
CPU without it, where PyTorch multiplies bf16 matrices in a plain loop, many times slower than fp32.
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

import torch
from torch.nn import functional as F

from cluster.config import TrainConfig
from cluster.hardware import autocast_dtype, keep_freed_memory
from jobs.command_line import parse
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.optimizer import PausableAdamW, parameter_groups
from sepico.step import AdaptationStep, StepBatch
from sepico.teacher import Teacher

PRESETS = {
    "deeplab": "gta2cityscapes_deeplabv2_distcl",
    "daformer": "gta2cityscapes_daformer_distcl",
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
BATCH = 2
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
UNIT = "s" if CUDA else "CPU-s"


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Clock:
    """Seconds by part, where it is asked for; a part inside another one is not counted in both."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.runs = False
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.runs:
            yield
            return
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        time_now = now()
        if self._open:
            self.seconds[self._open[-1]] += time_now - self._since
        self._since = time_now


class TimedTeacher(Teacher):
    def __init__(self, network, clock: Clock) -> None:
        super().__init__(network)
        self.clock = clock

    def probabilities(self, images):
        name = "crop" if images.shape[-1] == images.shape[-2] else "whole target"
        with self.clock.part(f"teacher, {name}"):
            return super().probabilities(images)

    def embeddings(self, images):
        with self.clock.part("teacher, source"):
            return super().embeddings(images)


class Training:
    """Student, teacher and optimiser of a published preset; `step` makes one step."""

    terms = ("source", "target", "mix")

    def __init__(self, network: str, precision: str, side: int) -> None:
        config = parse(TrainConfig, ["--config", PRESETS[network]])
        config.model = replace(config.model, encoder_weights=None)
        config.contrast = replace(config.contrast, start=0)
        torch.manual_seed(0)
        self.clock = Clock()
        self.student = build_segmentor(config.model).to(DEVICE).train()
        self.student.autocast_dtype = DTYPES[precision]
        self.teacher = TimedTeacher(copy.deepcopy(self.student), self.clock)
        self.adaptation = AdaptationStep(
            config, self.student.normalize, self.teacher, PixelContrast(config, device=DEVICE)
        )
        groups = parameter_groups(self.student, config.optimization)
        self.optimizer = PausableAdamW(groups, lr=1e-6, fused=True)
        self.batch = batch(side)

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

    def __init__(self, network: str, precision: str, side: int) -> None:
        # Here: before `sepico` it imports the compiler of torch, 140 MB that a worker spares.
        import segmentation_models_pytorch as smp

        model = parse(TrainConfig, ["--config", PRESETS[network]]).model
        self.encoder = smp.encoders.get_encoder(
            model.encoder, weights=None, output_stride=model.output_stride
        )
        self.encoder.to(DEVICE).train()
        self.dtype = DTYPES[precision]
        images = batch(side).source_image - 0.5
        self.images = images.contiguous(memory_format=torch.channels_last)

    def step(self) -> None:
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype is not None):
            last = self.encoder(self.images)[-1]
        torch.autograd.backward(last, torch.ones_like(last))
        self.encoder.zero_grad()


def batch(side: int) -> StepBatch:
    """Smooth random images, labels in blocks of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    source, target = (
        F.interpolate(torch.rand(BATCH, 3, side // 16, width, generator=generator), scale_factor=16)
        for width in (side // 16, side // 8)
    )
    labels = torch.randint(0, 19, (BATCH, 1, side // 32, side // 32), generator=generator)
    labels = labels.repeat_interleave(32, 2).repeat_interleave(32, 3)
    return StepBatch([1, 2], *(tensor.to(DEVICE) for tensor in (source, labels, target)))


def seconds(run) -> float:
    start = now()
    run()
    return now() - start


def measure_time(case: tuple, repeats: int, queue) -> None:
    set_up()
    training, encoder = Training(*case), Encoder(*case)
    for _ in range(3 if CUDA else 1):  # what is made once: the optimiser's state, kernels
        training.step()
        encoder.step()
    steps, encoders = [], []
    for _ in range(repeats):
        encoders.append(seconds(encoder.step))
        steps.append(seconds(training.step))
    training.clock.runs = True  # on a GPU it makes a step slower, which then waits for each part
    training.step()
    queue.put((min(encoders), min(steps), dict(training.clock.seconds)))


def measure_memory(case: tuple, queue) -> None:
    set_up()
    before = peak_gib()
    training = Training(*case)
    for _ in range(3):
        training.step()
    queue.put((peak_gib(), before))


def set_up() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def peak_gib() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1024**3
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
    parser.add_argument("--side", type=int, default=256, help="of the crops, in pixels")
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 5)
    arguments = parser.parse_args()
    capability = f"{torch.backends.cpu.get_cpu_capability()}, 1 thread"
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} with {capability}"
    print(f"{machine}, torch {torch.__version__}, crops of {arguments.side}")
    for network in arguments.network:
        for precision in arguments.precision:
            case = network, precision, arguments.side
            encoder, step, parts = in_own_process(measure_time, case, arguments.repeats)
            print(
                f"\n{network} {precision}: step {step:.3f} {UNIT} = {step / encoder:.2f} x encoder "
                f"({encoder:.3f} {UNIT})"
            )
            for name, spent in parts.items():
                print(f"  {name:<30}{spent:>8.3f} s{spent / encoder:>7.2f} x", flush=True)
            peak, before = in_own_process(measure_memory, case)
            print(f"  peak {peak:.2f} GiB, {before:.2f} of it before the network", flush=True)


if __name__ == "__main__":
    main()
