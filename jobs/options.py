"""Every option of every job as Markdown: `python -m jobs.options > docs/options.md`."""

import dataclasses
import inspect
from typing import Any

from docstring_parser import parse as parse_docstring

from cluster.config import TrainConfig
from cluster.evaluation import EvaluateConfig
from cluster.export import ExportConfig
from cluster.ingest import IngestConfig
from cluster.prediction import PredictConfig
from cluster.report import ReportConfig
from cluster.sweep_config import SweepConfig
from cluster.verification import VerifyConfig
from jobs.demo import DemoConfig
from jobs.k8s import TrainJob

JOBS = {
    "jobs.ingest": IngestConfig,
    "jobs.ingest verify": VerifyConfig,
    "jobs.train": TrainConfig,
    "jobs.evaluate": EvaluateConfig,
    "jobs.predict": PredictConfig,
    "jobs.sweep": SweepConfig,
    "jobs.export": ExportConfig,
    "jobs.report": ReportConfig,
    "jobs.k8s submit": TrainJob,
    "jobs.demo": DemoConfig,
}
HEAD = """# Options

Written by `python -m jobs.options > docs/options.md`; the text is the code's own. Every job also
has `--config PRESET_OR_FILE`, `--print_config`, `--log-level debug|info|warning|error` and
`--help`; `jobs.train` and `jobs.demo` have `--dry-run`. In a YAML file `--a.b` is the key `b` below
`a`.
"""


def document() -> str:
    """The whole page."""
    sections = [HEAD]
    for job, config in JOBS.items():
        said = parse_docstring(inspect.getdoc(config)).short_description
        rows = _rows(config, "", words=" " in job)
        if TrainConfig in config.__mro__[1:]:
            said += " The options of `jobs.train` are its trials'; its own:"
            rows = [row for row in rows if row not in _rows(TrainConfig, "")]
        lines = [f"## python -m {job}", "", said, "", "| option | default | meaning |"]
        lines += ["| --- | --- | --- |", *rows]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _rows(config: type, prefix: str, *, words: bool = False) -> list[str]:
    """A row a field, those of nested configurations after the plain ones.

    With `words` those without a default are words of the command line, not flags.
    """
    meanings = _meanings(config)
    plain, nested = [], []
    for field in dataclasses.fields(config):
        default = _default(field)
        if dataclasses.is_dataclass(default) and field.name != "workers":
            nested += _rows(type(default), f"{prefix}{field.name}.")
        else:
            meaning = " ".join(meanings[field.name].split()).replace("|", "\\|")
            word = words and default is dataclasses.MISSING
            option = field.name.upper() if word else f"--{prefix}{field.name}"
            plain.append(f"| `{option}` | {_shown(default)} | {meaning} |")
    return plain + nested


def _meanings(config: type) -> dict[str, str]:
    """What the docstrings of a configuration and those it inherits from say of each field."""
    found: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        if dataclasses.is_dataclass(parent):
            parameters = parse_docstring(inspect.getdoc(parent) or "").params
            found |= {p.arg_name: p.description or "" for p in parameters}
    return found


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if default in ("", None, [], ()):
        return ""
    return f"`{list(default) if isinstance(default, tuple) else default}`"


if __name__ == "__main__":
    print(document(), end="")
