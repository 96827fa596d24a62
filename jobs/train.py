"""Train a network: `python -m jobs.train --config PRESET_OR_FILE [--section.key value ...]`."""

from cluster.config import TrainConfig
from cluster.training import train
from jobs.command_line import run


def main(config: TrainConfig) -> None:
    """Train, or continue the run, and print where it lies and what it reached."""
    result = train(config)
    for name, value in result.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    run(main, TrainConfig)
