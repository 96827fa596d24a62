"""Search temperature and weights: `python -m jobs.sweep --config PRESET --run NAME`.

    python -m jobs.sweep --config my.yaml --run tau --space space.yaml --search.seeds [77,78]
    python -m jobs.sweep --resume tau

The same command again, or `--resume` without any other option, continues a sweep.
`--space` says what to search (jobs/spaces/contrast.yaml is the default and shows how). The result
is a ranked table, report.html, and best.yaml, which `python -m jobs.train --config` runs as it is.
"""

from importlib.resources import files
from pathlib import Path

from cluster.storage import open_storage
from cluster.sweep import check, sweep
from cluster.sweep_config import SweepConfig
from cluster.sweep_files import write_results
from cluster.sweep_results import table
from jobs.command_line import run


def main(config: SweepConfig) -> None:
    """Run or continue the sweep, print the table and say where the results lie.

    Raises WorkError, after the results are written, if no trial came to its end on all seeds.
    """
    ranking = sweep(config, _space(config))
    store = open_storage(ranking.plan.url, config.storage)
    write_results(ranking, store)
    print(table(ranking))
    ranking.check()
    print(f"report.html, trials.csv and best.yaml are in {store.url}")


def _space(config: SweepConfig) -> str:
    """The text of the space file; empty for a sweep that goes on with its own."""
    if config.space:
        if not Path(config.space).is_file():
            raise ValueError(f"space: no file {config.space}")
        return Path(config.space).read_text()
    if config.resume:
        return ""
    return files("jobs").joinpath("spaces", "contrast.yaml").read_text()


if __name__ == "__main__":
    run(main, SweepConfig, check=lambda config: check(config, _space(config)))
