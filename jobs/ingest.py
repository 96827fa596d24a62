"""Turn a published data set, or a folder of images and labels, into Arrow shards, once.

python -m jobs.ingest --dataset gtav --root DATA/gta --to s3://BUCKET/gtav --size 1280x720
python -m jobs.ingest --dataset dark_zurich --root DATA/dz --labels false --to s3://BUCKET/night
python -m jobs.ingest --root DATA/source_day --list train.txt --to s3://BUCKET/day --size 960x720
python -m jobs.ingest --root DATA/target_dusk --labels false --to s3://BUCKET/dusk

Started again after an interruption, the same command goes on where it was. What was written is
read back and compared with its checksums by

python -m jobs.ingest verify s3://BUCKET/gtav
"""

import sys

from cluster.ingest import IngestConfig, check, ingest
from cluster.verification import VerifyConfig, find, verify
from cluster.workers import connect_ray
from jobs.command_line import run


def begin(config: IngestConfig) -> None:
    check(config)
    connect_ray()


def main(config: IngestConfig) -> None:
    manifest = ingest(config)
    size = sum(shard.size for shard in manifest.shards)
    print(
        f"wrote {len(manifest)} images, {size / 1e6:.1f} MB, in {len(manifest.shards)} shards "
        f"to {manifest.url}"
    )


def report(config: VerifyConfig) -> None:
    """Print what is damaged, a line each. Raises ValueError if anything is."""
    connect_ray()
    manifest, damages = verify(config)
    for damage in damages:
        print(f"{damage.name}: {damage.reason}")
    counted = f"{len(manifest)} images in {len(manifest.shards)} shards of {manifest.url}"
    if damages:
        raise ValueError(f"{len(damages)} damaged of {counted}: ingest it again")
    print(f"{counted} are intact")


if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"]:
        run(report, VerifyConfig, check=find, arguments=sys.argv[2:], command="verify")
    else:
        run(main, IngestConfig, check=begin)
