"""A process that makes no progress is ended and says where it was."""

import subprocess
import sys
from pathlib import Path

START = """
import ctypes, sys, threading, time
from types import SimpleNamespace
from cluster import watchdog
from cluster.storage import StorageConfig, open_storage

watchdog.PATIENCE_S, watchdog.GRACE_S = 0, {grace}
run = open_storage(sys.argv[1], StorageConfig())
progress = SimpleNamespace(hung=SimpleNamespace(remote=print))

def wait_for_nobody():
    {hang}

with watchdog.Watchdog(2, run, 3, progress) as dog:
    dog.beat(120)
    wait_for_nobody()
"""


def run_until_it_ends(folder: Path, hang: str, grace: int = 1000) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START.format(hang=hang, grace=grace), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hang_leaves_the_traces_of_all_threads_in_the_log_and_the_run(tmp_path):
    ended = run_until_it_ends(tmp_path, "threading.Event().wait()")
    assert ended.returncode == 1
    traces = (tmp_path / "stacks/rank-00003-step-00000120.txt").read_text()
    assert "rank 3 made no progress for 2 s in step 120" in traces
    assert "thread MainThread" in traces and "wait_for_nobody" in traces
    assert traces in ended.stderr
    assert ended.stdout == f"3 120 file://{tmp_path}/stacks\n"


def test_code_that_never_returns_to_python_is_ended_too(tmp_path):
    # PyDLL keeps the GIL during the call, so no thread of Python runs.
    ended = run_until_it_ends(tmp_path, "ctypes.PyDLL(None).sleep(1000)", grace=1)
    assert ended.returncode == 1
    assert "in wait_for_nobody" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_that_makes_progress_lives(tmp_path):
    beats = "ends = time.monotonic() + 5\n    while time.monotonic() < ends: dog.beat()"
    ended = run_until_it_ends(tmp_path, beats)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())
