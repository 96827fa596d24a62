"""Many command lines, each in a process of its own, for the price of one start.

`python -m tests.jobs.forked` reads a JSON list of cases from stdin, imports what jobs import, and
forks a process for every case, which runs its job as `python -m` does. It prints a JSON list of
exit code, stdout and stderr. Before a fork nothing is done that does not survive one.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

IMPORTED = ("cluster.prediction", "cluster.report", "cluster.ingest", "cluster.export")


@dataclass
class Case:
    """A command line; `file_bytes` is the largest file it may write, as on a disk that is full."""

    job: str
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None


def run_cases(cases: list[Case]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each case, in order."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.forked"],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


def _run(case: Case) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            _become(case, files)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), *(file.read_text() for file in files)


def _become(case: Case, files: list[Path]) -> None:
    code = 70  # never reached by a job
    try:
        for descriptor, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ.update(case.environment)
        if case.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes, -1))
        sys.argv = [case.job, *case.arguments]
        runpy.run_module(case.job, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for module in IMPORTED:
        import_module(module)
    print(json.dumps([_run(Case(**case)) for case in json.load(sys.stdin)]))
