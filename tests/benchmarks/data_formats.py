"""The same samples in each reader's own format, and each reader as an iterator over them.

A sample is (key, JPEG bytes, (H, W) uint8 label, the label's PNG bytes). `write` fills a local
folder, which the benchmark uploads; `read` yields an item a sample: its tensors, or its bytes only.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import obstore
import torch
import xxhash
from torchvision.io import ImageReadMode, decode_image

from cluster.manifest import write_manifest
from cluster.prefetch import Prefetcher, Work
from cluster.ranges import PATIENCE
from cluster.reader import open_reader
from cluster.shards import Shard, ShardWriter, shard_rows
from cluster.storage import StorageConfig, open_storage
from sepico.taxonomies import CITYSCAPES_19

SHARD_BYTES = 64 << 20
AHEAD = 4
Samples = list[tuple[str, bytes, np.ndarray, bytes]]


def decode(image: bytes, label: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reader of JPEG and PNG does with a sample's bytes."""
    image, label = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (image, label))
    return decode_image(image, mode=ImageReadMode.RGB), decode_image(label)[0]


def chunks(samples: Samples) -> Iterator[Samples]:
    """Neighbours of about SHARD_BYTES together."""
    size, chunk = 0, []
    for sample in samples:
        chunk.append(sample)
        size += len(sample[1])
        if size >= SHARD_BYTES:
            yield chunk
            size, chunk = 0, []
    if chunk:
        yield chunk


class Arrow:
    """Ours; `ordered` reads in the order of the shards, else under a full permutation."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered

    def write(self, samples: Samples, folder: Path) -> None:
        storage, shards = open_storage(str(folder), StorageConfig()), []
        for number, chunk in enumerate(chunks(samples)):
            writer = ShardWriter(CITYSCAPES_19)
            for key, image, label, _ in chunk:
                writer.add(key, image, label.shape, label)
            data = writer.finish()
            shard = Shard(f"shard-{number:05d}.arrow", len(data), xxhash.xxh3_64_intdigest(data))
            storage.put(shard.name, data)
            shards.append((shard, shard_rows(data, CITYSCAPES_19.num_classes)))
        write_manifest(storage, CITYSCAPES_19, shards, labelled=True, options={})

    def read(self, url: str, endpoint: str, folder: Path, decoded: bool) -> Iterator:
        reader = open_reader(url, StorageConfig(endpoint=endpoint))
        count = len(reader.manifest)
        order = range(count) if self._ordered else np.random.default_rng(0).permutation(count)

        def prepare(payload):
            if not decoded:
                return payload
            sample = reader.decode(payload)
            return sample.image, sample.label

        works = (Work([(reader, int(i))], prepare) for i in order)
        stream = Prefetcher(works, threads=1, ahead=AHEAD)
        yield from stream
        reader.stop()
        stream.close()
        reader.close()


class Limit(Arrow):
    """What no reader can beat: unchecked ranges of our shards, or their decoding in memory."""

    def read(self, url: str, endpoint: str, folder: Path, decoded: bool) -> Iterator:
        config = StorageConfig(endpoint=endpoint)
        reader = open_reader(url, config)
        manifest = reader.manifest
        store = open_storage(url, config, PATIENCE)
        order = np.random.default_rng(0).permutation(len(manifest))
        if decoded:
            payloads = [reader.fetch([i])[0] for i in order[:64]]
            yield None  # from here on the time counts
            for turn in range(len(manifest)):
                sample = reader.decode(payloads[turn % 64])
                yield sample.image, sample.label
            return

        def get(i: int):
            shard = manifest.shards[manifest.shard[i]].name
            return store.get_range(shard, int(manifest.offsets[i]), int(manifest.lengths[i]))

        with ThreadPoolExecutor(32) as pool:
            yield None
            for begin in range(0, len(order), 64):
                yield from pool.map(get, order[begin : begin + 64])


class Mosaic:
    """MosaicML Streaming, a full permutation of the samples."""

    def write(self, samples: Samples, folder: Path) -> None:
        from streaming import MDSWriter

        columns = {"image": "bytes", "label": "bytes"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
            for _, image, _, png in samples:
                writer.write({"image": image, "label": png})

    def read(self, url: str, endpoint: str, folder: Path, decoded: bool) -> Iterator:
        from streaming import StreamingDataset

        os.environ["S3_ENDPOINT_URL"] = endpoint
        data = StreamingDataset(
            remote=url, local=str(folder), shuffle=True, shuffle_algo="naive", batch_size=8
        )
        for sample in data:
            both = sample["image"], sample["label"]
            yield decode(*both) if decoded else both


class Lit:
    """LitData, shuffled in its way: by chunk."""

    def write(self, samples: Samples, folder: Path) -> None:
        from litdata.streaming import Cache

        cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
        for i, (_, image, _, png) in enumerate(samples):
            cache[i] = {"image": image, "label": png}
        cache.done()
        cache.merge()

    def read(self, url: str, endpoint: str, folder: Path, decoded: bool) -> Iterator:
        from litdata import StreamingDataset
        from litdata.streaming import downloader
        from litdata.streaming.resolver import Dir

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it knows no plain endpoints
        data = StreamingDataset(
            Dir(path=str(folder), url=url),
            shuffle=True,
            storage_options={"endpoint_url": endpoint},
        )
        for sample in data:
            both = sample["image"], sample["label"]
            yield decode(*both) if decoded else both


class Web:
    """WebDataset through curl, in the order of the shards."""

    def write(self, samples: Samples, folder: Path) -> None:
        for number, chunk in enumerate(chunks(samples)):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for key, image, _, png in chunk:
                    for name, data in ((f"{key}.jpg", image), (f"{key}.png", png)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    def read(self, url: str, endpoint: str, folder: Path, decoded: bool) -> Iterator:
        import webdataset

        config = StorageConfig(endpoint=endpoint)
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client = boto3.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
        signed = [
            client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": f"{prefix}/{name}"}
            )
            for name in open_storage(url, config).list()
        ]
        pipes = [f"pipe:curl -s -f '{address}'" for address in signed]
        data = webdataset.WebDataset(pipes, shardshuffle=False, empty_check=False)
        for sample in data:
            both = sample["jpg"], sample["png"]
            yield decode(*both) if decoded else both


READERS = {
    "limit": Limit(ordered=False),
    "ours": Arrow(ordered=False),
    "ours, in order": Arrow(ordered=True),
    "mosaic": Mosaic(),
    "litdata": Lit(),
    "webdataset, in order": Web(),
}


def upload(folder: Path, url: str, endpoint: str) -> None:
    store = open_storage(url, StorageConfig(endpoint=endpoint))._store
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        obstore.put(store, str(path.relative_to(folder)), path)
