"""A run that pauses with its workers."""

from dataclasses import replace

import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.config import TrainConfig
from cluster.pausing import PausingTraining
from cluster.storage import open_storage
from cluster.training import train
from jobs.command_line import parse
from tests.jobs.training import STEPS, command, final_weights, metrics


def test_a_run_that_pauses_and_ends_there_goes_on_to_what_it_would_have_been(trained, tmp_path):
    undisturbed, options = trained
    config = parse(TrainConfig, command("", options)[3:])
    config = replace(config, runs=str(tmp_path), run=str(tmp_path / "pausing"))
    run = open_storage(config.run, config.storage)
    training = PausingTraining(config, [1, 4, STEPS])
    for step in (1, 4):
        training.go_on(step)
        assert list_checkpoints(run)[-1].step == step
        assert metrics(tmp_path / "pausing")[-1].keys() >= {"student_miou", "teacher_miou"}
    training.end()
    assert list_checkpoints(run)[-1].step == 4, "trained on, without leave"
    starts = list((tmp_path / "pausing/tensorboard").glob("events*"))
    assert len(starts) == 1, "the workers were not kept"

    train(config)
    for part in ("student", "teacher", "statistics"):
        expected, found = final_weights(undisturbed, part), final_weights(run, part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
