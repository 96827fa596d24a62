"""A sweep as a person runs it: `python -m jobs.sweep`, real trials on a real cluster."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.jobs.training import TINY, command, final_weights, run_job

SPACE = "contrast.temperature: {choice: [0.2, 100.0]}\n"
SEARCH = {
    "workers": "1",
    "search.algorithm": "grid",
    "search.rungs": "2",
    "search.reduction": "2",
    "search.top": "1",
}


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("records/*.json"))]


def worker_starts(run: Path) -> int:
    return len(list(run.glob("tensorboard/events*")))


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_a_sweep_whose_driver_is_killed_goes_on_and_its_best_preset_trains(data, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    new = {"space": str(tmp_path / "space.yaml"), "run": str(tmp_path / "sweep")}
    folder = tmp_path / "sweep"
    with subprocess.Popen(
        command("jobs.sweep", {**TINY, **data, **SEARCH, **new}), stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and job.poll() is None:
            if any(record["status"] == "finished" for record in records(folder)):
                break
            time.sleep(0.1)
        os.kill(job.pid, signal.SIGKILL)
        _, shown = job.communicate()
    finished = [Path(r["run"][7:]) for r in records(folder) if r["status"] == "finished"]
    assert finished, shown

    again = run_job("jobs.sweep", {"resume": str(folder)})
    assert again.returncode == 0, again.stderr
    assert all(worker_starts(run) == 1 for run in finished), "restarted at a stop, or repeated"
    (warm_up,) = (folder / "prefix").iterdir()
    assert worker_starts(warm_up) == 1
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert {row["contrast.temperature"] for row in rows} == {"0.2", "0.5", "100.0"}
    done = [row for row in rows if row["status"] == "finished"]
    assert len(done) >= 2 and {row["status"] for row in rows} <= {"finished", "stopped"}
    page = (folder / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"' <]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.count("<svg") == 4 and "IoU per class" in page

    best = min(done, key=lambda row: -float(row["student_miou"]))
    trained = run_job(
        "jobs.train", {"config": str(folder / "best.yaml"), "run": str(tmp_path / "best")}
    )
    assert trained.returncode == 0, trained.stderr
    expected = final_weights(folder / "trials" / best["name"])
    for name, value in final_weights(tmp_path / "best").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
