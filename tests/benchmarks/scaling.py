"""Two workers on two cores against one worker on one core, each with the same work.

    python tests/benchmarks/scaling.py --config camvid_day2dusk
    python tests/benchmarks/scaling.py --statistics --steps 1 --images 1 \\
        --config gta2cityscapes_daformer_distcl --engine.activation_checkpointing true

Both groups live throughout and take turns; the median of their rounds counts. "side by side" is one
worker while an independent one runs on the other core: what the two cores share (memory, cache,
clock) costs it too, and the rest of the difference is communication. `--statistics` measures only
what a step of two workers waits for the all-reduce of the class statistics.
"""

import argparse
from statistics import median

from workers import Group, configuration, machine


def measure_scaling(config, images: int, steps: int, rounds: int) -> None:
    with (
        Group(config, images, [0]) as one,
        Group(config, images, [1]) as other,
        Group(config, images, [0, 1]) as two,
    ):
        for group in (one, other, two):
            group.call("steps", 1)  # what is made once: the optimiser's state, kernels
        alone, beside, together = [], [], []
        for _ in range(rounds):
            alone.append(one.call("steps", steps)[0])
            one.begin("steps", steps)
            beside.append(max(*other.call("steps", steps), *one.end()))
            together.append(max(two.call("steps", steps)))
        for name, seconds in (("alone", alone), ("side by side", beside), ("two", together)):
            print(f"{name:<14}{median(seconds) / steps:8.3f} s a step")
        print(f"of linear     {median(alone) / median(together):8.3f}")
        print(f"of side by side {median(beside) / median(together):6.3f}")
        print_statistics(two, median(together) / steps, rounds * steps + 1)


def measure_statistics(config, images: int, steps: int) -> None:
    with Group(config, images, [0, 1]) as two:
        two.call("steps", 1)
        two.call("blocked")
        seconds = max(two.call("steps", steps)) / steps
        print(f"two           {seconds:8.3f} s a step")
        print_statistics(two, seconds, steps)


def print_statistics(two: Group, step: float, steps: int) -> None:
    waits, sizes = zip(*two.call("blocked"), strict=True)
    blocked = max(waits) / steps
    print(
        f"statistics    {sizes[0]:,} bytes; a step waits {1e3 * blocked:.2f} ms for them, "
        f"{blocked / step:.3%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=8, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--statistics", action="store_true")
    arguments, config = configuration(parser)
    size = f"{config.data.crop_width}x{config.data.crop_height}"
    print(f"{machine()}\n{config.model.encoder}, crops {size}, {arguments.images} images a worker")
    if arguments.statistics:
        measure_statistics(config, arguments.images, arguments.steps)
    else:
        measure_scaling(config, arguments.images, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
