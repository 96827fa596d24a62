"""What every job's command line does alike.

`--config` takes a preset's name or a YAML file, every key is a flag (`--section.key value`, a bare
`--key` for true), later ones win, and `--print_config` shows the result. `--log-level` sets which
events are shown. A user's mistake is one line on stderr, never a traceback: exit code 2 if it shows
before work starts, 1 if it shows later. An interrupt (Ctrl-C, `ray job stop`) ends a job through
its `finally` clauses, with 130 or 143.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from cluster.errors import WorkError
from cluster.events import LEVELS, set_log_level

Config = TypeVar("Config")
USAGE_ERROR, DATA_ERROR, INTERRUPTED, TERMINATED = 2, 1, 130, 143
DRY_RUN, LOG_LEVEL = "--dry-run", "--log-level"


def run(
    main: Callable[[Config], Any],
    config_class: type[Config],
    *,
    check: Callable[[Config], Any] | None = None,
    dry_run: Callable[[Config], Any] | None = None,
    arguments: list[str] | None = None,
    command: str | None = None,
) -> None:
    """Parse the command line into `config_class`, `check` it, then call `main` with it.

    With `dry_run` there is a flag `--dry-run` that calls it instead of both. `check` looks at the
    world outside the configuration (folders, stores) before work starts: a ValueError there is a
    usage error like one in the configuration itself. Without `check` so is one in `main`, unless it
    is a WorkError.

    `command` is the word that `arguments` came after, for a job that does several things; keys
    without a default are then words too, not flags.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(config_class, arguments, dry_run=dry_run is not None, command=command)
    signal.signal(signal.SIGTERM, _terminate)
    if dry_run is not None and DRY_RUN in arguments:
        main, check = dry_run, None
    checked = False
    try:
        if check is not None:
            check(config)
            checked = True
        main(config)
    except ValueError as error:
        late = checked or isinstance(error, WorkError)
        _end(error, DATA_ERROR if late else USAGE_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit:  # Ray's waiting gives it a code of its own
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            sys.exit(TERMINATED)
        raise


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the end takes its time
    sys.exit(TERMINATED)


def parse(
    config_class: type[Config],
    arguments: list[str] | None = None,
    *,
    dry_run: bool = False,
    command: str | None = None,
) -> Config:
    """The configuration that a command line describes; ends the process if it is wrong."""
    parser = _parser(config_class, command)
    if dry_run:
        what = "Build everything, train nothing, print what the run would be."
        parser.add_argument(DRY_RUN, action="store_true", help=what)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        namespace = parser.instantiate(parser.parse_args(_with_true(parser, arguments)))
        set_log_level(namespace.log_level)
        names = [field.name for field in dataclasses.fields(config_class)]
        return config_class(**{name: namespace[name] for name in names})
    except (ArgumentError, TypeError, ValueError) as error:
        _end(error, USAGE_ERROR)


def _with_true(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The arguments with the "true" that a bare flag of a boolean key stands for."""
    flags = {
        option
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for option in action.option_strings
    }
    completed = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        completed.append(argument)
        if argument in flags and following.startswith("--"):
            completed.append("true")
    return completed


def presets() -> list[str]:
    """Names that `--config` knows."""
    names = (entry.name for entry in files("jobs").joinpath("presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


class _PresetOrFile(ActionConfigFile):
    """`--config`: a preset's name or the path of a YAML file."""

    def __call__(
        self, parser: ArgumentParser, cfg: Any, values: str, option_string: str | None = None
    ) -> None:
        if not Path(values).is_file():
            if values not in presets():
                known = ", ".join(presets()) or "none"
                raise ValueError(
                    f"--config {values}: neither a file nor a preset; the presets are: {known}"
                )
            values = str(files("jobs").joinpath("presets", f"{values}.yaml"))
        try:
            super().__call__(parser, cfg, values, option_string)
        except (ArgumentError, TypeError, ValueError) as error:
            raise ValueError(f"--config {values}: {error}") from None


def _parser(config_class: type, command: str | None) -> ArgumentParser:
    module = sys.modules["__main__"].__spec__
    parser = ArgumentParser(
        prog=" ".join(filter(None, ("python -m", module.name, command))) if module else None,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print_config",
    )
    parser.add_argument("--config", action=_PresetOrFile, help="Preset name or YAML file.")
    what = "Events on stderr: this level and above; debug adds what workers print."
    parser.add_argument(LOG_LEVEL, choices=LEVELS, default="info", help=what)
    parser.add_class_arguments(config_class, as_positional=command is not None)
    return parser


def _end(error: Exception, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
