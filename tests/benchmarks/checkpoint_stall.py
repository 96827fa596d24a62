"""What a checkpoint costs the steps beside it: intervals with one against intervals without.

    python tests/benchmarks/checkpoint_stall.py --config camvid_day2dusk [--to s3://BUCKET/PREFIX]

Two workers on two cores; intervals take turns and their medians count. The workers have no core to
spare for the thread that writes, so all that it computes shows.
"""

import argparse
import tempfile
from statistics import median

from workers import Group, configuration, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--interval", type=int, default=30, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", default="", help="URL; default: a temporary folder")
    arguments, config = configuration(parser)
    with tempfile.TemporaryDirectory() as folder, Group(config, arguments.images, [0, 1]) as two:
        two.call("steps", 1)
        plain, saved, stalled = [], [], []
        for _ in range(arguments.rounds):
            plain.append(max(two.call("steps", arguments.interval)))
            of_ranks = two.call("save", arguments.to or folder, arguments.interval)
            saved.append(max(seconds for seconds, _ in of_ranks))
            stalled.append(max(stall for _, stall in of_ranks))
    without, extra = median(plain), median(saved) - median(plain)
    print(machine())
    print(f"{config.model.encoder}: {arguments.interval} steps take {without:.2f} s")
    print(f"the call that starts a checkpoint takes {1e3 * median(stalled):.1f} ms")
    print(f"with a checkpoint they take {extra:+.3f} s, {extra / without:+.2%}")
    every = config.checkpoint_every / config.optimization.batch_ratio / arguments.interval
    print(f"at checkpoint_every {config.checkpoint_every}: {extra / without / every:+.3%}")


if __name__ == "__main__":
    main()
