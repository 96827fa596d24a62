"""A run that pauses with its workers, in an actor, as a sweep trains its trials."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.util import placement_group_table

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.pausing import PausingTraining
from cluster.storage import open_storage
from cluster.training import train
from cluster.trial_groups import remove_lost_groups
from jobs.command_line import parse
from tests.jobs.training import STEPS, command, final_weights, metrics


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(parent: int, name: str) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def processes(name: str) -> list[int]:
    """Of this process's own Ray cluster."""
    raylets = children(os.getpid(), "raylet")
    return [pid for raylet in raylets for pid in children(raylet, name)]


def kill_a_worker(run: Path) -> None:
    """Returns when new ones have begun."""
    begun = run / "environment.json"
    before = begun.stat().st_mtime_ns
    os.kill(processes("TrainWorker")[0], signal.SIGKILL)
    wait_until(lambda: begun.stat().st_mtime_ns != before)


def is_free() -> bool:
    """Whether all cores are, and no placement group is left."""
    groups = placement_group_table().values()
    free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
    return free and {group["state"] for group in groups} <= {"REMOVED"}


@ray.remote(num_cpus=0)
class Driver:
    """What Tune runs of a trial."""

    def __init__(self, config: TrainConfig, steps: list[int]) -> None:
        self.training = PausingTraining(config, steps)

    def train_to(self, step: int) -> None:
        self.training.train_to(step)

    def end(self) -> None:
        self.training.end()


@pytest.fixture
def config(trained, tmp_path) -> TrainConfig:
    config = parse(TrainConfig, command("", trained[1])[3:])
    return replace(config, runs=str(tmp_path), run=str(tmp_path / "pausing"))


def test_a_run_that_pauses_and_ends_there_goes_on_to_what_it_would_have_been(
    trained, config, tmp_path
):
    undisturbed, _ = trained
    run = open_storage(config.run, config.storage)

    def worker_starts() -> int:
        return len(list((tmp_path / "pausing/tensorboard").glob("events*")))

    driver = Driver.remote(config, [1, 2, 4, STEPS])
    try:
        for step in (1, 2, 4):
            ray.get(driver.train_to.remote(step))
            assert list_checkpoints(run)[-1].step == step
            assert metrics(tmp_path / "pausing")[-1].keys() >= {"student_miou", "teacher_miou"}
            if step == 2:
                assert worker_starts() == 1, "the workers were not kept"
                assert not processes("TrainController"), "a process beside the driver's"
                kill_a_worker(tmp_path / "pausing")
    finally:
        ray.get(driver.end.remote())
    assert list_checkpoints(run)[-1].step == 4, "trained on, without leave"
    assert worker_starts() == 2
    wait_until(is_free)

    train(config)
    for part in ("student", "teacher", "statistics"):
        expected, found = final_weights(undisturbed, part), final_weights(run, part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_a_lost_driver_leaves_no_worker_and_no_placement_group(config):
    driver = Driver.remote(config, [1, STEPS])
    ray.get(driver.train_to.remote(1))
    assert not is_free()
    (pid,) = processes("ray::Driver")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: remove_lost_groups() or is_free())
    wait_until(lambda: not processes("TrainWorker"))
