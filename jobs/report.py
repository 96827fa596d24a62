"""One HTML file about runs, which needs nothing beside it.

python -m jobs.report --run source_only --run sepico [--to report.html]
"""

import sys

from cluster.report import ReportConfig, check, report
from jobs.command_line import run


def main(config: ReportConfig) -> None:
    print(f"wrote {report(config)}")


if __name__ == "__main__":
    # `--run` again adds a run.
    words = [word.replace("--run=", "--run+=") for word in sys.argv[1:]]
    words = ["--run+" if word == "--run" else word for word in words]
    run(main, ReportConfig, check=check, arguments=words)
