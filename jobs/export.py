"""A run's student or teacher as one folder that loads without Ray and DeepSpeed.

python -m jobs.export --run RUN --to FOLDER [--network teacher] [--step N]
"""

from cluster.export import ExportConfig, export
from jobs.command_line import run


def main(config: ExportConfig) -> None:
    checkpoint = export(config)
    measured = "".join(f", {name} {value:.1f}" for name, value in checkpoint.metrics.items())
    print(f"wrote the {config.network} of step {checkpoint.step} to {config.to}{measured}")


if __name__ == "__main__":
    run(main, ExportConfig)
