"""IoU on a labelled set, or a submission of an unlabelled one, of a run or of an authors' file.

python -m jobs.evaluate --run RUN [--data URL]
python -m jobs.evaluate --checkpoint FILE.pth --data URL
python -m jobs.evaluate --run RUN --data URL --inference.scales [0.5,1,1.5] --inference.flip true
"""

from typing import Any

from cluster.evaluation import EvaluateConfig, evaluate
from jobs.command_line import run

# Key in the report -> label in the table; 16 and 13 classes of Cityscapes' 19 are SYNTHIA's.
MEANS = {"miou": "mIoU", "miou_16": "mIoU (16)", "miou_13": "mIoU (13)"}


def table(report: dict[str, Any]) -> str:
    """Classes down, networks across, mIoU last (over subsets of the classes too); percent."""
    names = list(report["rows"])
    means = [key for key in MEANS if key in report["rows"][names[0]]]
    width = max(map(len, [*report["classes"], *(MEANS[key] for key in means)]))
    lines = [" " * width + "".join(f"{name:>{len(name) + 3}}" for name in names)]
    for label in report["classes"]:
        values = [report["rows"][name]["iou"][label] for name in names]
        lines.append(_line(label, values, names, width))
    lines.append("-" * len(lines[0]))
    for key in means:
        values = [report["rows"][name][key] for name in names]
        lines.append(_line(MEANS[key], values, names, width))
    return "\n".join(lines)


def _line(label: str, values: list[float | None], names: list[str], width: int) -> str:
    cells = ("-" if value is None else f"{value:.1f}" for value in values)
    columns = zip(cells, names, strict=True)
    return f"{label:<{width}}" + "".join(f"{cell:>{len(name) + 3}}" for cell, name in columns)


def main(config: EvaluateConfig) -> None:
    """Print the table and say where its JSON lies."""
    report, url = evaluate(config)
    submissions = [row["submission"] for row in report["rows"].values() if "submission" in row]
    print("\n".join(f"submission {place}" for place in submissions) or table(report))
    what = report.get("checkpoint") or f"step {report['step']} of {report['run']}"
    print(f"{what} on {report['data']}; written to {url}")


if __name__ == "__main__":
    run(main, EvaluateConfig)
