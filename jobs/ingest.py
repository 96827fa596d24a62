"""Turn a published data set, or a folder of images and labels, into Arrow shards, once.

python -m jobs.ingest --dataset gtav --root DATA/gta --to s3://BUCKET/gtav --size 1280x720
python -m jobs.ingest --dataset dark_zurich --root DATA/dz --labels false --to s3://BUCKET/night
python -m jobs.ingest --root DATA/source_day --list train.txt --to s3://BUCKET/day --size 960x720
python -m jobs.ingest --root DATA/target_dusk --labels false --to s3://BUCKET/dusk
"""

from cluster.ingest import IngestConfig, check, ingest
from cluster.training import connect_ray
from jobs.command_line import run


def main(config: IngestConfig) -> None:
    connect_ray()
    manifest = ingest(config)
    size = sum(shard.size for shard in manifest.shards)
    print(
        f"wrote {len(manifest)} images, {size / 1e6:.1f} MB, in {len(manifest.shards)} shards "
        f"to {manifest.url}"
    )


if __name__ == "__main__":
    run(main, IngestConfig, check=check)
