"""Statistics, contrast and label down-scaling against a naive N x C x A implementation.

    python tests/benchmarks/contrast.py [--pixels 12800 51200] [--repeats 5]

The sizes are the feature pixels of two 640x640 crops at stride 8 (ResNet-101) and 4 (MiT-B5). Each
measurement runs in a process of its own with one thread: the least CPU time of its repeats, since
a shared machine only ever adds to it, and how far the process grew beyond its inputs (Linux only).
The naive side is what the method's formulas say when they are written down one tensor at a time, as
the authors' code does; it is left out where it would not fit in memory. The last columns divide the
largest size by the smallest; a little above linear is the price of tensors above 32 MiB, whose
pages glibc takes from the kernel anew each time.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from sepico import losses
from sepico.statistics import ClassStatistics, FeatureBank

CHANNELS, CLASSES, CROP, ROWS, TEMPERATURE = 512, 19, 640, 200, 0.1


def inputs(pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops with `pixels` feature pixels, and labels in blocks so that all are kept."""
    torch.manual_seed(0)
    side = int((pixels / 2) ** 0.5)
    features = F.normalize(torch.randn(2, CHANNELS, side, side), dim=1)
    blocks = torch.randint(0, CLASSES, (2, 1, side, side))
    stride = CROP // side
    return features, blocks.repeat_interleave(stride, 2).repeat_interleave(stride, 3)


def stride(features: torch.Tensor, labels: torch.Tensor) -> int:
    return labels.shape[3] // features.shape[3]


def rows_and_classes(features, labels) -> tuple[torch.Tensor, torch.Tensor]:
    step = stride(features, labels)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    return rows, labels[:, 0, ::step, ::step].flatten()


def prototypes() -> tuple[torch.Tensor, torch.Tensor, FeatureBank]:
    generator = torch.Generator().manual_seed(1)
    mean = F.normalize(torch.randn(CLASSES, CHANNELS, generator=generator), dim=1)
    variance = torch.rand(CLASSES, CHANNELS, generator=generator) / CHANNELS
    bank = FeatureBank(CLASSES, CHANNELS, ROWS)
    for _ in range(ROWS):
        bank.update(torch.randn(CLASSES, CHANNELS, generator=generator), torch.ones(CLASSES) > 0)
    return mean, variance, bank


def select(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses.select_pixels(features, labels, num_classes=CLASSES)


def ours_statistics(features, labels):
    rows, classes = rows_and_classes(features, labels)
    return lambda: ClassStatistics(CLASSES, CHANNELS).update(rows, classes)


def naive_statistics(features, labels):
    rows, classes = rows_and_classes(features, labels)

    def update():
        one_hot = F.one_hot(classes, CLASSES).float()
        of_class = rows[:, None] * one_hot[:, :, None]  # N x C x A
        count = one_hot.sum(0).clamp(min=1)[:, None]
        mean = of_class.sum(0) / count
        return ((of_class - mean * one_hot[:, :, None]) ** 2).sum(0) / count

    return update


def contrast_with(loss: Callable) -> Callable:
    """Down-scale, select, loss, backward."""

    def build(features, labels):
        mean, variance, bank = prototypes()

        def run():
            leaf = features.detach().requires_grad_()
            rows, classes = select(leaf, labels)
            loss(rows, classes, mean, variance, bank).backward()

        return run

    return build


def ours_dist(rows, classes, mean, variance, bank):
    return losses.dist_contrast(rows, classes, mean, variance, temperature=TEMPERATURE)


def naive_dist(rows, classes, mean, variance, bank):
    n = len(rows)
    means, variances = mean.expand(n, -1, -1), variance.expand(n, -1, -1)
    similarity = (rows[:, None] * means).sum(2) / TEMPERATURE
    spread = (rows[:, None] ** 2 * variances).sum(2) / (2 * TEMPERATURE**2)
    logits = similarity + spread
    return (logits.logsumexp(1) - similarity.gather(1, classes[:, None])[:, 0]).mean()


def ours_bank(rows, classes, mean, variance, bank):
    return losses.bank_contrast(rows, classes, bank, temperature=TEMPERATURE)


def naive_bank(rows, classes, mean, variance, bank):
    every = torch.stack([bank.rows(c) for c in range(CLASSES)])  # C x M x A
    similarity = torch.einsum("na,cma->ncm", rows, every) / TEMPERATURE
    own = F.one_hot(classes, CLASSES).bool()
    negative = similarity.mean(2).exp().masked_fill(own, 0).sum(1, keepdim=True)
    positive = similarity[own].exp()
    return -(positive / (positive + negative)).log().mean()


def ours_labels(features, labels):
    factor = stride(features, labels)
    return lambda: losses.downscale_labels(labels, factor, num_classes=CLASSES, min_ratio=0.75)


def naive_labels(features, labels):
    factor = stride(features, labels)

    def run():
        one_hot = F.one_hot(labels[:, 0], CLASSES + 1).permute(0, 3, 1, 2).float()
        share, winner = F.avg_pool2d(one_hot, factor).max(1, keepdim=True)
        winner[(share < 0.75) | (winner == CLASSES)] = 255
        return winner

    return run


MEASURED = {
    "class statistics": (ours_statistics, naive_statistics),
    "dist contrast": (contrast_with(ours_dist), contrast_with(naive_dist)),
    "bank contrast": (contrast_with(ours_bank), contrast_with(naive_bank)),
    "label down-scaling": (ours_labels, naive_labels),
}


def measure(name: str, naive: bool, pixels: int, repeats: int, queue) -> None:
    torch.set_num_threads(1)
    MEASURED[name][naive](*inputs(200))()  # loads what is loaded once
    run = MEASURED[name][naive](*inputs(pixels))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the inputs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    queue.put((1000 * min(times), grown / 1024))


def in_own_process(*arguments) -> tuple[float, float]:
    """Milliseconds and MiB of `measure`; NaN where the process died."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else (float("nan"),) * 2


def of_file(path: str, key: str) -> str:
    """The value of the first line of a /proc file that starts with `key`."""
    lines = Path(path).read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(key))


def quotient(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Of times and of sizes; a size below 1 MiB is no divisor."""
    return a[0] / b[0], a[1] / b[1] if b[1] >= 1 else float("nan")


def row(what: str, side: str, values: list[tuple[float, float]], digits: tuple[int, int]) -> None:
    cells = [f"{v:>9.{d}f}" for pair in values for v, d in zip(pair, digits, strict=True)]
    print(f"{what:<20}{side:<8}" + "".join(cells), flush=True)


def compare(name: str, sizes: list[int], repeats: int) -> None:
    """Print ours, the naive side and their ratio at every size, growth last."""

    def with_growth(values):
        return [*values, quotient(values[-1], values[0])]

    ours = [in_own_process(name, False, pixels, repeats) for pixels in sizes]
    row(name, "ours", with_growth(ours), (1, 0))
    naive = []
    for pixels in sizes:
        needed = naive[-1][1] * pixels / sizes[len(naive) - 1] if naive else 0
        available = int(of_file("/proc/meminfo", "MemAvailable").split()[0]) / 1024
        if needed > 0.9 * available:
            print(f"{name}: naive at N = {pixels} skipped, {needed:.0f} MiB do not fit")
            naive.append((float("nan"),) * 2)
        else:
            naive.append(in_own_process(name, True, pixels, repeats))

    ratios = [quotient(theirs, mine) for theirs, mine in zip(naive, ours, strict=True)]
    row("", "naive", with_growth(naive), (0, 0))
    row("", "ratio", ratios, (1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[12800, 51200])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    machine = f"{of_file('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores"
    print(f"{machine}, torch {torch.__version__}, 1 thread")
    sizes = arguments.pixels
    titles = [f"N = {pixels}" for pixels in sizes] + [f"N x {sizes[-1] / sizes[0]:.2g}"]
    print(" " * 28 + "".join(f"{title:>18}" for title in titles))
    print(" " * 28 + f"{'ms':>9}{'MiB':>9}" * len(titles))
    for name in MEASURED:
        compare(name, sizes, arguments.repeats)


if __name__ == "__main__":
    main()
