"""Faults of real processes in mid-run: the run ends as if it had never met one."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.jobs.training import command, final_weights


def check_a_fault(
    fault: str, trained: tuple[Path, dict[str, str]], folder: Path, **changed: str
) -> str:
    """Train with the fault, compare with the run that had none; returns what the job showed."""
    undisturbed, options = trained
    words = command("tests.jobs.faults", {**options, "runs": str(folder), **changed})
    words[3:3] = [fault, str(folder)]
    job = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr
    seconds = [(folder / name).stat().st_mtime for name in ("fired", "recovered")]
    print(f"{fault}: first new step after {seconds[1] - seconds[0]:.1f} s")
    for part in ("student", "teacher", "statistics"):
        expected = final_weights(undisturbed, part)
        found = final_weights(folder / "first", part)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), part
    assert files_of(folder / "first") == files_of(undisturbed)
    return job.stderr


def files_of(run: Path) -> set[Path]:
    """What lies in a run, apart from what a start of the workers adds and a profile."""
    names = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    # A start has a generation of its own.
    files = {Path(re.sub(r"(step-\d+)-\d+/|(lease)/.*", r"\1\2/", name)) for name in names}
    return {path for path in files if path.parts[0] not in ("tensorboard", "stacks", "profile")}


@pytest.fixture(autouse=True)
def several_nodes(nodes, monkeypatch):
    """Each worker is on a node of its own, the driver on another."""
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["all-reduce", "checkpoint", "forward", "backward"])
def test_a_worker_killed_in_mid_work_costs_only_time(fault, trained, tmp_path):
    shown = check_a_fault(fault, trained, tmp_path)
    print(*(line for line in shown.splitlines() if "restarted" in line))
    assert '"event": "restarted"' in shown


@pytest.mark.slow
def test_a_lost_node_costs_only_time(nodes, trained, tmp_path):
    nodes.add_node(num_cpus=1)  # one to spare
    check_a_fault("node", trained, tmp_path)


@pytest.mark.slow
def test_a_run_that_may_not_be_written_ends_with_what_refused_it(trained, tmp_path):
    options = {**trained[1], "runs": str(tmp_path), "data.cache": "/proc/nocache"}
    words = command("tests.jobs.faults", options)
    words[3:3] = ["denied", str(tmp_path)]
    job = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert job.returncode == 1
    *events, error = job.stderr.splitlines()
    assert re.fullmatch(r"error: run \S+/first: checkpoints/\S+: access denied", error)
    events = [json.loads(line) for line in events if line.startswith("{")]
    (restarted,) = (event for event in events if event["event"] == "restarted")
    assert restarted["message"] in error
    uncached = [event["message"] for event in events if event["event"] == "cache_off"]
    assert uncached and "/proc/nocache: No such file or directory: samples are" in uncached[0]


@pytest.mark.slow
def test_a_hanging_worker_is_replaced_and_the_waiting_ones_leave_stack_traces(trained, tmp_path):
    shown = check_a_fault("hang", trained, tmp_path, hang_timeout="30")
    traces = (tmp_path / "first/stacks/rank-00000-step-00000004.txt").read_text()
    assert "rank_sum.py" in traces, "not where rank 0 waits for the hanging one's batch-norm sums"
    assert f"step 4 hangs: stack traces of rank 0 in file://{tmp_path}/first/stacks" in shown
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "fired").read_text()), 0)
