"""Labels, overlays and confidence maps of a folder or bucket of images.

python -m jobs.predict --images PHOTOS --to PREDICTIONS --run RUN [--network teacher]
python -m jobs.predict --images s3://BUCKET/photos --to s3://BUCKET/labels --exported FOLDER
python -m jobs.predict --images PHOTOS --to PREDICTIONS --checkpoint FILE.pth --ids label
"""

import sys

from cluster.prediction import PredictConfig, check, predict
from cluster.workers import connect_ray
from jobs.command_line import run


def begin(config: PredictConfig) -> None:
    check(config)
    connect_ray()


def main(config: PredictConfig) -> None:
    """Predict, and say what could not be."""
    result = predict(config)
    for reason in result["failed"].values():
        print(f"not predicted: {reason}", file=sys.stderr)
    skipped = f", {result['done']} were done already" if result["done"] else ""
    print(
        f"predicted {result['predicted']} images to {config.to}, "
        f"{len(result['failed'])} could not be{skipped}"
    )


if __name__ == "__main__":
    run(main, PredictConfig, check=begin)
