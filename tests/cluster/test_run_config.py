"""What a run may change when it begins from another run's checkpoint."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from cluster import checkpoint_format
from cluster.checkpoint_format import MANIFEST, Checkpoint
from cluster.config import TrainConfig
from cluster.run_config import CONFIG, check_fork, prefix_digest
from cluster.storage import StorageConfig, open_storage
from sepico.config import ContrastConfig


def configure(fork: str = "", **changed: Any) -> TrainConfig:
    """The defaults with other values, of sections by `section__key`."""
    config = TrainConfig(method="bankcl", fork=fork, contrast=ContrastConfig(bank_length=100))
    for name, value in changed.items():
        section, _, key = name.rpartition("__")
        if section:
            name, value = section, replace(getattr(config, section), **{key: value})
        config = replace(config, **{name: value})
    return config


def described(config: TrainConfig) -> dict[str, Any]:
    """As a run stores it, without the classes of its data."""
    return json.loads(json.dumps(asdict(config)))


def check(config: TrainConfig) -> None:
    check_fork(config, described(config))


@pytest.fixture
def fork(tmp_path: Path) -> str:
    """URL of a checkpoint of a run with a bank of 100."""
    run = open_storage(str(tmp_path / "run"), StorageConfig())
    run.put(CONFIG, json.dumps(described(configure())).encode())
    checkpoint = Checkpoint(30, 1, 1, 1, {}, {})
    run.put(f"{checkpoint.prefix}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())
    run.put(f"{checkpoint.prefix}/student-00000.safetensors", b"")
    return f"{run.url}/{checkpoint.prefix}"


def test_a_fork_may_change_what_acts_from_the_contrasts_start_on(fork):
    check(configure(fork, contrast__temperature=0.1, contrast__weight=0.5, workers=2))
    check(configure(fork, method="protocl", contrast__regularizer_weight=0.0))
    check(configure(fork, contrast__bank_length=50))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher__threshold": 0.9}, ["teacher.threshold = 0.968", "0.9", "contrast.temperature"]),
        ({"seed": 1}, ["seed = 76"]),
        ({"mic__weight": 1.0}, ["mic.weight"]),
        ({"contrast__start": 2000}, ["contrast.start = 3000"]),
        ({"contrast__bank_length": 200}, ["a bank of 100", "contrast.bank_length is 200", "cut"]),
        ({"method": "source_only"}, ["source_only"]),
    ],
)
def test_a_fork_refuses_what_acts_before(changed, words, fork):
    with pytest.raises(ValueError) as error:
        check(configure(fork, **changed))
    assert all(word in str(error.value) for word in words), error.value


def test_a_fork_names_a_checkpoint_that_is_not_there(fork):
    missing = fork.replace("00000030", "00000031")
    with pytest.raises(ValueError, match=r"step-00000031-1: no such checkpoint"):
        check(configure(missing))


def test_a_fork_from_a_damaged_checkpoint_names_the_file(fork, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "PIECE_BYTES", 4)
    run = open_storage(fork.rpartition("/checkpoints/")[0], StorageConfig())
    name, content = "student-00000.safetensors", b"0123456789"
    digest = xxhash.xxh3_64_hexdigest(content)
    checkpoint = Checkpoint(30, 1, 1, 1, {}, {}, files={name: digest})
    run.put(f"{checkpoint.prefix}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())
    run.put(f"{checkpoint.prefix}/{name}", content)
    check(configure(fork))
    for damaged in (content[:-1], b"x" + content[1:], content[:-1] + b"x"):
        run.put(f"{checkpoint.prefix}/{name}", damaged)
        with pytest.raises(ValueError, match=r"student-00000.safetensors is damaged"):
            check(configure(fork))


def test_runs_share_a_warm_up_if_they_differ_in_nothing_that_acts_in_it():
    base = prefix_digest(configure())
    assert prefix_digest(configure(contrast__temperature=0.1, workers=2, run="other")) == base
    assert prefix_digest(configure(method="distcl", contrast__bank_length=5)) == base
    for changed in ({"teacher__threshold": 0.9}, {"seed": 1}, {"contrast__start": 10}):
        assert prefix_digest(configure(**changed)) != base
