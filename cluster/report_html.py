"""The page of a report: text and tables, and pictures inside the file."""

import json
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.report import ReportedRun

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 1120px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #d5dae2; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e6e9ef; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } figcaption, footer { color: #5b6675; font-size: .9em; }
figure { margin: 1em 0; }
pre { background: #f5f7fa; padding: 1em; overflow: auto; font-size: 12px; }
"""


def page(title: str, sections: list[str]) -> str:
    """The whole document; nothing in it is fetched from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def summary(runs: "list[ReportedRun]", data: str) -> str:
    """A row for every network of every run."""
    lines = []
    for run in runs:
        config, rows = run.config, run.rows(data)
        for name, row in rows.items() or {"student": {"miou": None}}.items():
            lines.append(
                [
                    run.name,
                    config["method"],
                    name,
                    "-" if row["miou"] is None else f"{row['miou']:.1f}",
                    str(max((int(line["step"]) + 1 for line in run.metrics), default=0)),
                    str(config["optimization"]["global_batch"]),
                    f"{run.worker_hours:.2f}",
                ]
            )
    head = ["run", "method", "network", "mIoU, %", "steps", "global batch", "worker hours"]
    said = f"mIoU on {data}; worker hours: the training steps of all workers together."
    return f"<h2>Runs</h2>{table(head, lines)}<p>{escape(said)}</p>"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def figure(title: str, picture: bytes, caption: str) -> str:
    """A picture, SVG or PNG, inside the page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml"
    source = f"data:image/{kind};base64,{b64encode(picture).decode()}"
    return (
        f'<h2>{escape(title)}</h2><figure><img alt="{escape(title)}" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def details(run: "ReportedRun") -> str:
    """Hardware and versions in a table, the whole configuration folded."""
    environment = run.environment
    known: dict[str, Any] = {
        "checkpoints": run.store.url,
        "workers": environment.get("workers"),
        "cores a worker": environment.get("cpus_per_worker"),
        "GPU": environment.get("gpu") or "none",
        "processor": environment.get("processor"),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items()),
    }
    rows = [
        [name, "not recorded" if value in (None, "") else str(value)]
        for name, value in known.items()
    ]
    config = escape(json.dumps(run.config, indent=1))
    return (
        f"<h2>{escape(run.name)}</h2>{table(['', ''], rows)}"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )
