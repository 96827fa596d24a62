"""A run that pauses with its workers."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import ray
import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.pausing import PausingTraining
from cluster.storage import open_storage
from cluster.training import train
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


def kill_a_worker(run: Path) -> None:
    """One of those that this process's own Ray cluster runs; returns when new ones have begun."""
    begun = run / "environment.json"
    before = begun.stat().st_mtime_ns
    workers = [
        pid for raylet in children(os.getpid(), "raylet") for pid in children(raylet, "TrainWorker")
    ]
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: begun.stat().st_mtime_ns != before)


def test_a_run_that_pauses_and_ends_there_goes_on_to_what_it_would_have_been(trained, tmp_path):
    undisturbed, options = trained
    config = parse(TrainConfig, command("", options)[3:])
    config = replace(config, runs=str(tmp_path), run=str(tmp_path / "pausing"))
    run = open_storage(config.run, config.storage)

    def worker_starts() -> int:
        return len(list((tmp_path / "pausing/tensorboard").glob("events*")))

    training = PausingTraining(config, [1, 2, 4, STEPS])
    try:
        for step in (1, 2, 4):
            training.train_to(step)
            assert list_checkpoints(run)[-1].step == step
            assert metrics(tmp_path / "pausing")[-1].keys() >= {"student_miou", "teacher_miou"}
            if step == 2:
                assert worker_starts() == 1, "the workers were not kept"
                kill_a_worker(tmp_path / "pausing")
    finally:
        training.end()
    assert list_checkpoints(run)[-1].step == 4, "trained on, without leave"
    assert worker_starts() == 2
    cores = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU", 0) == cores)

    train(config)
    for part in ("student", "teacher", "statistics"):
        expected, found = final_weights(undisturbed, part), final_weights(run, part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
