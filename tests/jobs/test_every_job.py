"""Every job answers a mistake with one line on stderr and the right exit code."""

import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest

from tests.processes import start_module
from tests.s3_server import free_ports

JOBS = ("ingest", "train", "sweep", "evaluate", "predict", "export", "report", "demo")
PLACES = (
    "EMPTY",
    "RUN",
    "CORRUPT",
    "TO",
    "PHOTOS",
    "FOLDER",
    "LABELLED",
    "UNLABELLED",
    "NOPTH",
    "OTHER",
)


@dataclass
class Mistake:
    """A command line with names of PLACES in it, its exit code, and words of its one line."""

    what: str
    command: str
    code: int
    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.command.split()[0]}, {self.what}"


TRAIN = "train --config demo --data.target UNLABELLED --runs TO --data.source"
ASKS_FOR = {
    "ingest": "root", "train": "data.source", "evaluate": "--run", "predict": "images",
    "export": "run", "report": "--run",
}  # fmt: skip
UNREACHABLE = {"RAY_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"}
NO_CLUSTER = ["no Ray cluster answers at", UNREACHABLE["RAY_ADDRESS"]]
MISTAKES = [
    *(Mistake("no arguments", job, 2, [word]) for job, word in ASKS_FOR.items()),
    *(Mistake("misspelled key", f"{job} --no_such_key 1", 2, ["no_such_key"]) for job in JOBS),
    *(Mistake("misspelled level", f"{job} --log-level loud", 2, ["loud", "info"]) for job in JOBS),
    *(
        Mistake("unreachable cluster", command, 2, NO_CLUSTER, UNREACHABLE)
        for command in (
            "ingest --root FOLDER --to TO",
            f"{TRAIN} LABELLED --data.crop_height 32 --data.crop_width 64 --data.rcs_min_pixels 50"
            " --model.encoder tu-test_efficientnet --model.encoder_weights null",
            "evaluate --run RUN",
            "predict --images PHOTOS --to TO --run RUN",
            "demo --folder TO",
        )
    ),
    Mistake("empty folder", "ingest --root EMPTY --to TO", 2, ["no folder", "EMPTY"]),
    Mistake("empty prefix", f"{TRAIN} EMPTY", 2, ["EMPTY", "jobs.ingest"]),
    Mistake("empty prefix", "evaluate --run EMPTY", 2, ["no run at", "EMPTY"]),
    Mistake("empty data", "evaluate --run RUN --data EMPTY", 2, ["EMPTY", "jobs.ingest"]),
    Mistake("empty prefix", "predict --images EMPTY --to TO --run RUN", 2, ["no images", "EMPTY"]),
    Mistake("empty prefix", "export --run EMPTY --to TO", 2, ["no run at", "EMPTY"]),
    Mistake("empty prefix", "report --run EMPTY --to TO/a.html", 2, ["no run at", "EMPTY"]),
    Mistake("corrupt file", "evaluate --checkpoint NOPTH --data LABELLED", 2, ["loads safely"]),
    Mistake("corrupt file", "predict --images PHOTOS --to TO --checkpoint NOPTH", 2, ["safely"]),
    Mistake("corrupt checkpoint", "export --run CORRUPT --to TO", 2, ["student-00000", "damaged"]),
    Mistake("corrupt checkpoint", "report --run CORRUPT --to TO/a.html", 1, ["student-00000"]),
    Mistake(
        "corrupt checkpoint", "predict --run CORRUPT --images PHOTOS --to OTHER", 1,
        ["student-00000"], {"RAY_ADDRESS": "CLUSTER"},
    ),
    Mistake("full disk", "export --run RUN --to TO", 2, ["model.safetensors"], {}, 2000),
    Mistake(
        "full disk", "report --run RUN --to TO/a.html --images 0 --embedding none", 1,
        ["a.html"], {}, 2000,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(trained, data, folder, tmp_path_factory):
    """Where the names in the table lie."""
    root = tmp_path_factory.mktemp("places")
    (root / "EMPTY").mkdir()
    (root / "NO.pth").write_bytes(b"no checkpoint")
    shutil.copytree(trained[0], root / "CORRUPT")
    (weights,) = (root / "CORRUPT/checkpoints").glob("step-00000006-*/student-00000.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + b"damaged!")
    known = {
        "RUN": trained[0], "FOLDER": folder, "PHOTOS": folder / "images", "NOPTH": root / "NO.pth",
        "LABELLED": data["data.source"], "UNLABELLED": data["data.target"],
    }  # fmt: skip
    return {name: str(known.get(name, root / name)) for name in PLACES}


@pytest.fixture(scope="module")
def results(places, ray_cluster):
    started, done = deque(), []  # two at a time

    def start(*command, file_bytes=None):
        if len(started) == 2:
            done.append(started.popleft()())
        started.append(start_module(*command, file_bytes=file_bytes))

    for mistake in MISTAKES:
        job, *arguments = mistake.command.split()
        for name in sorted(PLACES, key=len, reverse=True):
            arguments = [_put(word, name, places[name]) for word in arguments]
        environment = {k: v.replace("CLUSTER", ray_cluster) for k, v in mistake.environment.items()}
        with patch.dict(os.environ, environment):
            start(f"jobs.{job}", arguments, file_bytes=mistake.file_bytes)
    for job in JOBS:
        start(f"jobs.{job}", ["--help"])
    return done + [finish() for finish in started]


def _put(word: str, name: str, place: str) -> str:
    return place + word.removeprefix(name) if word == name or word.startswith(f"{name}/") else word


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=map(str, MISTAKES))
def test_a_mistake_is_one_line_and_the_right_code(results, places, index):
    mistake, job = MISTAKES[index], results[index]
    code, stderr = job.returncode, job.stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    assert code == mistake.code, lines[0]
    for word in mistake.words:
        assert places.get(word, word) in lines[0], lines[0]


@pytest.mark.parametrize("index", range(len(JOBS)), ids=JOBS)
def test_help_shows_the_options_and_is_no_mistake(results, index):
    job = results[len(MISTAKES) + index]
    assert job.returncode == 0, job.stderr
    assert job.stdout.startswith(f"usage: python -m jobs.{JOBS[index]}")
    assert "--log-level" in job.stdout


def test_mistakes_leave_nothing_behind(results, places, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    assert not [path for path in root.rglob("TO/**/*") if path.is_file()]
