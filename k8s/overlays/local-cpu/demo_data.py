"""Generate the demo's scenes and ingest them into a bucket: `demo_data.py BUCKET_URL ENDPOINT`.

Runs before the demo's job, in a pod of its own with a local Ray. What is there already is kept.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import boto3

from jobs.demo import DATA_SETS
from jobs.street_scenes import write_dataset

bucket, endpoint = sys.argv[1:]
name = bucket.removeprefix("s3://")
s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
if name not in [found["Name"] for found in s3.list_buckets()["Buckets"]]:
    s3.create_bucket(Bucket=name)
for seed, (data_set, (domain, count, labelled)) in enumerate(DATA_SETS.items()):
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / data_set
        write_dataset(images, domain=domain, count=count, seed=seed)
        options = {
            "root": str(images),
            "to": f"{bucket}/{data_set}",
            "labels": str(labelled).lower(),
            "storage.endpoint": endpoint,
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        subprocess.run([sys.executable, "-m", "jobs.ingest", *flags], check=True)
