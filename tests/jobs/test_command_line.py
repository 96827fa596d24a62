"""Flags, files and presets make one configuration; a mistake in any of them is one line."""

import signal
import sys
from dataclasses import dataclass, field

import pytest

from cluster.errors import WorkError
from cluster.sweep_config import SweepConfig
from jobs.command_line import parse, presets, run


@dataclass
class Inner:
    """The inner part.

    Attributes:
        rate: Steps a second.
        name: What it is called.
    """

    rate: float = 1.0
    name: str = "inner"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"inner.rate {self.rate} must not be negative")


@dataclass
class Outer:
    """A job.

    Attributes:
        steps: Number of steps.
        sizes: Two sizes, pixels.
        inner: The inner part.
    """

    steps: int
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")


def failure(capsys, call, *arguments, **options):
    with pytest.raises(SystemExit) as caught:
        call(*arguments, **options)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return caught.value.code, error


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("steps: 5\nsizes: [3, 4, 5]\ninner:\n  rate: 1e-3\n  name: file\n")
    config = parse(Outer, ["--config", str(path), "--inner.name", "flag"])
    assert config == Outer(5, (3, 4, 5), Inner(1e-3, "flag"))
    assert parse(Outer, ["--steps", "1"]) == Outer(1)


def test_every_preset_is_found_by_its_name(capsys):
    assert presets() == sorted(presets())
    code, error = failure(capsys, parse, Outer, ["--config", "no_such_preset", "--steps", "1"])
    assert code == 2 and "no_such_preset: neither a file nor a preset" in error
    assert all(name in error for name in presets())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "steps"),
        (["--steps", "0"], "steps 0 must be at least 1"),
        (["--steps", "1", "--inner.rate", "-1"], "inner.rate -1.0 must not be negative"),
        (["--steps", "1", "--inner.rat", "1"], "--inner.rat"),
        (["--steps", "1", "--inner.rate", "fast"], "inner.rate"),
        ([], "steps"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, arguments, message):
    code, error = failure(capsys, parse, Outer, arguments)
    assert code == 2 and message in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("validation.every", "0"),
        ("teacher.crop_tries", "0"),
        ("contrast.start", "-1"),
        ("cpus_per_worker", "-1"),
        ("seed", "-1"),
        ("search.seeds", "[-1]"),
        ("model.head_channels", "0"),
        ("model.projection_channels", "0"),
        ("model.head_dilations", "[6, 0]"),
    ],
)
def test_a_count_that_would_end_a_worker_is_refused(capsys, key, value):
    code, error = failure(capsys, parse, SweepConfig, [f"--{key}", value])
    assert code == 2 and f"{key} is {value}: " in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nstep: 2\n", "step"),
        ("steps: 1\ninner:\n  rat: 2\n", "rat"),
        ("steps: one\n", "steps"),
        ("steps: [1\n", "job.yaml"),
        ("just text\n", "job.yaml"),
    ],
)
def test_a_wrong_file_is_one_line(capsys, tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    code, error = failure(capsys, parse, Outer, ["--config", str(path)])
    assert code == 2 and message in error


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Outer, ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--steps", "Number of steps.", "--inner.rate", "Steps a second.", "Two sizes"):
        assert part in text


def test_print_config_gives_a_file_that_gives_the_same(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(Outer, ["--steps", "3", "--inner.rate", "0.5", "--print_config"])
    path = tmp_path / "job.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(Outer, ["--config", str(path)]) == Outer(3, inner=Inner(0.5))


def test_the_exit_code_says_whether_work_had_started(capsys):
    def refuse(config):
        raise ValueError("bad\ndata")

    def begin_and_refuse(config):
        raise WorkError("bad\ndata")

    arguments = ["--steps", "1"]
    assert failure(capsys, run, refuse, Outer, arguments=arguments) == (2, "error: bad data\n")
    begun = failure(capsys, run, begin_and_refuse, Outer, arguments=arguments)
    assert begun == (1, "error: bad data\n")
    checked = failure(capsys, run, pytest.fail, Outer, check=refuse, arguments=arguments)
    assert checked == (2, "error: bad data\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["check", "main"])
def test_an_interrupt_ends_a_job_with_its_code_at_any_stage(sent, code, stage):
    def interrupted(config):
        try:
            signal.raise_signal(sent)
        except SystemExit:
            sys.exit(15)  # as Ray's waiting does

    stages = {"check": lambda config: None, "main": pytest.fail, stage: interrupted}
    before = signal.getsignal(signal.SIGTERM)
    # Tests that a script runs in the background ignore it.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
            run(stages["main"], Outer, check=stages["check"], arguments=["--steps", "1"])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupts)
    assert isinstance(caught.value, SystemExit) and caught.value.code == code


def test_a_bug_keeps_its_traceback():
    def broken(config):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(broken, Outer, arguments=["--steps", "1"])
