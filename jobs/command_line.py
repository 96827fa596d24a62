"""What every job's command line does alike.

`--config` takes a preset's name or a YAML file, every key is a flag (`--section.key value`), later
ones win, and `--print_config` shows the result. A user's mistake is one line on stderr, never a
traceback: exit code 2 if it shows before work starts, 1 if it shows later.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

Config = TypeVar("Config")
USAGE_ERROR, DATA_ERROR, INTERRUPTED = 2, 1, 130
DRY_RUN = "--dry-run"


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
    usage error like one in the configuration itself.

    `command` is the word that `arguments` came after, for a job that does several things; keys
    without a default are then words too, not flags.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(config_class, arguments, dry_run=dry_run is not None, command=command)
    if dry_run is not None and DRY_RUN in arguments:
        main, check = dry_run, None
    try:
        if check is not None:
            check(config)
    except ValueError as error:
        _end(error, USAGE_ERROR)
    try:
        main(config)
    except ValueError as error:
        _end(error, DATA_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


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
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
        names = [field.name for field in dataclasses.fields(config_class)]
        return config_class(**{name: namespace[name] for name in names})
    except (ArgumentError, TypeError, ValueError) as error:
        _end(error, USAGE_ERROR)


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
    parser.add_class_arguments(config_class, as_positional=command is not None)
    return parser


def _end(error: Exception, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
