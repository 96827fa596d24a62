"""With which configuration a sweep is continued."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.config import TrainConfig, WorkerRange
from cluster.data import DataConfig
from cluster.storage import StorageConfig, open_storage
from cluster.sweep import SWEEP, _settings
from cluster.sweep_config import SearchConfig, SweepConfig
from sepico.config import OptimizationConfig

SPACE = "contrast.temperature: {uniform: [1.0, 4.0]}"


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    """A folder that a sweep was moved to."""
    store = open_storage(str(tmp_path / "moved"), StorageConfig())
    base = TrainConfig(run="file:///old", workers=2, optimization=OptimizationConfig(warmup=7))
    stored = {"config": asdict(base), "search": asdict(SearchConfig(trials=5)), "space": SPACE}
    store.put(SWEEP, json.dumps(stored).encode())
    return store.url


def test_a_moved_sweep_is_continued_where_it_is(sweep):
    base, search, space = _settings(SweepConfig(resume=sweep), "")
    assert (base.run, base.workers, base.optimization.warmup) == (sweep, 2, 7)
    assert (search.trials, space) == (5, SPACE)


def test_what_is_given_beside_resume_counts(sweep):
    given = SweepConfig(
        resume=sweep,
        fall_back=True,
        workers=WorkerRange(1, 1),
        storage=StorageConfig(endpoint="http://127.0.0.1:1"),
        search=SearchConfig(trials=5),  # as it was
    )
    base, _, _ = _settings(given, "")
    assert (base.fall_back, base.workers, base.storage) == (True, given.workers, given.storage)
    assert base.optimization.warmup == 7


def test_data_may_be_named_beside_resume_as_at_the_start(sweep, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = open_storage(sweep, StorageConfig())
    stored = json.loads(store.get(SWEEP))
    stored["config"]["data"]["source"] = (tmp_path / "shards/day").as_uri()
    store.put(SWEEP, json.dumps(stored).encode())
    _settings(SweepConfig(resume=sweep, data=DataConfig(source="shards/day")), "")
    with pytest.raises(ValueError, match=r"data\.source"):
        _settings(SweepConfig(resume=sweep, data=DataConfig(source="shards/night")), "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": 77}, ["seed = 76", "77"]),
        ({"search": SearchConfig(trials=6)}, ["search.trials = 5", "6"]),
        ({"optimization": OptimizationConfig(warmup=8)}, ["optimization.warmup = 7", "8"]),
    ],
)
def test_what_trials_would_differ_by_is_refused_beside_resume(given, words, sweep):
    with pytest.raises(ValueError) as error:
        _settings(SweepConfig(resume=sweep, **given), "")
    assert all(word in str(error.value) for word in [*words, "--resume"]), error.value
