"""A run that begins from another run's checkpoint."""

from dataclasses import replace

import pytest
import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.storage import StorageConfig, open_storage
from cluster.training import train
from jobs.command_line import parse
from tests.jobs.training import command, final_weights, metrics

START = 2


@pytest.fixture(scope="module")
def warm_up(ray_cluster, trained, tmp_path_factory) -> str:
    """Checkpoint at the contrast's start of a run with a memory bank and other weights."""
    _, options = trained
    runs = tmp_path_factory.mktemp("forks")
    changed = {"method": "bankcl", "contrast.temperature": "3", "contrast.weight": "0.2"}
    config = parse(
        TrainConfig, command("", {**options, **changed, "runs": str(runs), "run": "warm"})[3:]
    )
    train(config, until=START)
    run = open_storage(str(runs / "warm"), StorageConfig())
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.step == START and checkpoint.pinned
    return f"{run.url}/{checkpoint.prefix}"


@pytest.mark.slow
def test_a_fork_equals_the_run_trained_from_its_beginning(warm_up, trained, tmp_path):
    run, options = trained
    config = parse(TrainConfig, command("", options)[3:])
    train(replace(config, fork=warm_up, runs=str(tmp_path)))
    for part in ("student", "teacher", "statistics"):
        expected, found = final_weights(run, part), final_weights(tmp_path / "first", part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    steps = [line["step"] for line in metrics(tmp_path / "first") if "source_ce" in line]
    assert steps == list(range(START, config.optimization.steps)), "the warm-up was trained again"
