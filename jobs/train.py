"""Train a network: `python -m jobs.train --config PRESET_OR_FILE [--section.key value ...]`.

With `--dry-run` it builds everything, trains nothing and prints what the run would be.
"""

from cluster.config import TrainConfig
from cluster.training import train
from jobs.command_line import run


def main(config: TrainConfig) -> None:
    """Train, or continue the run, and print where it lies and what it reached."""
    result = train(config)
    for name, value in result.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")


def dry_run(config: TrainConfig) -> None:
    """Print parameters, memory, traffic and schedule."""
    from cluster.dry_run import describe  # imports DeepSpeed, which a driver never needs

    describe(config)


if __name__ == "__main__":
    run(main, TrainConfig, dry_run=dry_run)
