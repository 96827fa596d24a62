"""What a sweep says of trials of which some, or all, did not come to their end."""

import math
from pathlib import Path

import pytest

from cluster import sweep_report
from cluster.config import TrainConfig
from cluster.errors import WorkError
from cluster.storage import StorageConfig, open_storage
from cluster.sweep_config import MEASURES
from cluster.sweep_files import write_results
from cluster.sweep_records import FAILED, FINISHED, Record
from cluster.sweep_results import Ranking, rank
from cluster.sweep_space import Point, parse_space
from cluster.sweep_trial import Plan

POINT = {"contrast.temperature": 3.0}


def finished(point: Point, seed: int, miou: float) -> Record:
    measured = {f"student_{measure}": miou for measure in MEASURES}
    return Record("done", "run", point, seed, FINISHED, measured={"5": measured})


def failed(point: Point, seed: int) -> Record:
    return Record("lost", "run", point, seed, FAILED, reason="step 3 is not finite")


def ranked(folder: Path, records: list[Record]) -> Ranking:
    base, url = TrainConfig(), open_storage(str(folder), StorageConfig()).url
    space = parse_space("contrast.temperature: {uniform: [1.0, 4.0]}", base)
    return rank(records, Plan(url, base, space, "student_miou", [5], 2, None), [76, 77])


def write(ranking: Ranking, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(sweep_report, "_class_ious", lambda _: "")  # it needs the data
    write_results(ranking, open_storage(str(folder), StorageConfig()))
    return {path.name for path in folder.iterdir()}


def test_what_failed_on_one_seed_is_ranked_by_the_other(tmp_path, monkeypatch):
    seeds = [failed({}, 77), failed(POINT, 77)]
    ranking = ranked(tmp_path, [*seeds, finished({}, 76, 50.0), finished(POINT, 76, 51.0)])
    assert ranking.best.point == POINT
    assert write(ranking, tmp_path, monkeypatch) >= {"trials.csv", "report.html", "best.yaml"}
    with pytest.raises(WorkError, match=r"temperature=3, did not .* on 77: step 3 is not finite"):
        ranking.check()


def test_more_seeds_rank_before_a_better_mean(tmp_path):
    own = [finished({}, 76, 50.0), finished({}, 77, 50.0)]
    ranking = ranked(tmp_path, [finished(POINT, 76, 51.0), failed(POINT, 77), *own])
    ranking.check()
    assert [entry.point for entry in ranking.entries] == [{}, POINT]


@pytest.mark.parametrize("record", [failed({}, 76), finished({}, 76, math.nan)])
def test_without_a_trial_that_has_the_objective_there_is_a_table_of_trials(
    record, tmp_path, monkeypatch
):
    ranking = ranked(tmp_path, [record])
    assert write(ranking, tmp_path, monkeypatch) == {"trials.csv"}
    with pytest.raises(WorkError, match="no trial came to its end with a student_miou"):
        ranking.check()
