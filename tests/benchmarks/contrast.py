"""Statistics, contrast and label down-scaling against a naive N x C x A implementation.

    python tests/benchmarks/contrast.py [--pixels 12800] [--repeats 5]

Each measurement runs in a process of its own with one thread: the median of its repeats, and how
far the process grew beyond its inputs. The naive side is what the method's formulas say when they
are written down one tensor at a time, as the authors' code does.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from sepico import losses
from sepico.statistics import ClassStatistics, FeatureBank

CHANNELS, CLASSES, STRIDE, ROWS, TEMPERATURE = 512, 19, 8, 200, 0.1


def inputs(pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of 2 with `pixels` feature pixels, and labels in blocks so that all are kept."""
    torch.manual_seed(0)
    side = int((pixels / 2) ** 0.5)
    features = F.normalize(torch.randn(2, CHANNELS, side, side), dim=1)
    blocks = torch.randint(0, CLASSES, (2, 1, side, side))
    return features, blocks.repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3)


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
    rows, classes = flat(features), labels[:, 0, ::STRIDE, ::STRIDE].flatten()
    return lambda: ClassStatistics(CLASSES, CHANNELS).update(rows, classes)


def naive_statistics(features, labels):
    rows, classes = flat(features), labels[:, 0, ::STRIDE, ::STRIDE].flatten()

    def update():
        one_hot = F.one_hot(classes, CLASSES).float()
        of_class = rows[:, None] * one_hot[:, :, None]  # N x C x A
        count = one_hot.sum(0).clamp(min=1)[:, None]
        mean = of_class.sum(0) / count
        return ((of_class - mean * one_hot[:, :, None]) ** 2).sum(0) / count

    return update


def flat(features: torch.Tensor) -> torch.Tensor:
    return features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


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
    return lambda: losses.downscale_labels(labels, STRIDE, num_classes=CLASSES, min_ratio=0.75)


def naive_labels(features, labels):
    def run():
        one_hot = F.one_hot(labels[:, 0], CLASSES + 1).permute(0, 3, 1, 2).float()
        share, winner = F.avg_pool2d(one_hot, STRIDE).max(1, keepdim=True)
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    queue.put((1000 * statistics.median(times), grown / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[12800, 51200])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    print(f"{'':<20}{'N':>8}{'ours ms':>10}{'MiB':>8}{'naive ms':>10}{'MiB':>8}{'ratio':>8}")
    for pixels in arguments.pixels:
        for name in MEASURED:
            sides = []
            for naive in (False, True):
                queue = context.Queue()
                process = context.Process(
                    target=measure, args=(name, naive, pixels, arguments.repeats, queue)
                )
                process.start()
                process.join()
                sides.append(queue.get() if process.exitcode == 0 else (float("nan"),) * 2)
            (ours, our_mib), (naive_ms, naive_mib) = sides
            print(
                f"{name:<20}{pixels:>8}{ours:>10.1f}{our_mib:>8.0f}{naive_ms:>10.0f}"
                f"{naive_mib:>8.0f}{naive_ms / ours:>8.1f}"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
