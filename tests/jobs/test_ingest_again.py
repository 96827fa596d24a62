"""An ingest started again goes on where it was, and ends with the bytes of an undisturbed one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

from cluster import lease
from cluster.ingest import IngestConfig, ingest
from cluster.lease import LeaseError, hold_lease
from cluster.manifest import read_manifest
from cluster.reader import ShardReader
from cluster.storage import StorageConfig, StorageError, open_storage

REPOSITORY = Path(__file__).parents[2]


def storage_at(folder):
    return open_storage(str(folder), StorageConfig())


def contents(folder):
    storage = storage_at(folder)
    return {name: storage.get(name) for name in storage.list()}


def config(root, to, **options):
    """A shard an image."""
    return IngestConfig(root=str(root), to=str(to), **{"shard_bytes": 1, **options})


def there_already(capsys):
    """The line that says how much was not done again."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "already" in line]
    return lines[0] if lines else None


def test_a_killed_ingest_goes_on(ray_cluster, make_folder, tmp_path, capsys):
    root = make_folder(tmp_path / "data", count=16, size=(240, 320))
    flags = ["--root", root, "--to", tmp_path / "out", "--shard_bytes", "1"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.ingest", *map(str, flags)],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": ray_cluster},
        stderr=subprocess.PIPE,
    )
    storage = storage_at(tmp_path / "out")
    while job.poll() is None and sum("shard" in name for name in storage.list()) < 3:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    with pytest.raises(StorageError, match="no manifest"):
        read_manifest(storage)
    # What a writer that dies inside a write leaves in a folder, and a shard of nothing.
    (tmp_path / "out/shard-00039-0-0.arrow#1").write_bytes(b"part")
    storage.put("shard-00099-0-0.arrow", b"left over")
    ingest(config(root, tmp_path / "out"))
    assert int(there_already(capsys).split()[0]) >= 3
    ingest(config(root, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*#*"))


def test_bad_data_stops_an_ingest_that_goes_on_once_it_is_mended(
    ray_cluster, make_folder, tmp_path, capsys
):
    root = make_folder(tmp_path / "data", count=40)
    good = (root / "images/frame038.jpg").read_bytes()
    (root / "images/frame038.jpg").write_bytes(b"no image".ljust(len(good)))
    with pytest.raises(ValueError, match=r"frame038.jpg does not decode"):
        ingest(config(root, tmp_path / "out"))
    names = storage_at(tmp_path / "out").list()
    assert names and all(name.startswith("shard-") for name in names)
    (root / "images/frame038.jpg").write_bytes(good)
    ingest(config(root, tmp_path / "out"))
    assert there_already(capsys) == f"{len(names)} of 40 shards were there already"


def test_a_changed_file_is_seen_whatever_its_size_and_date(
    ray_cluster, make_folder, tmp_path, capsys
):
    root = make_folder(tmp_path / "data")
    before = ingest(config(root, tmp_path / "out"))
    path = root / "images/frame005.jpg"
    size, modified = path.stat().st_size, path.stat().st_mtime_ns
    write_jpeg(torch.zeros(3, 48, 64, dtype=torch.uint8), str(path))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(modified, modified))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, modified)
    capsys.readouterr()
    after = ingest(config(root, tmp_path / "out"))
    assert there_already(capsys) == "11 of 12 shards were there already"
    assert not ShardReader(storage_at(tmp_path / "out"), after).read(5).image.any()
    assert before.shards[4] == after.shards[4] and before.shards[5] != after.shards[5]


def test_other_options_use_nothing_of_what_is_there(ray_cluster, folder, tmp_path, capsys):
    ingest(config(folder, tmp_path))
    manifest = ingest(config(folder, tmp_path, size="32x24"))
    assert manifest.image_size == (24, 32)
    assert not ingest(config(folder, tmp_path, labels=False)).labelled
    assert there_already(capsys) is None


@pytest.mark.parametrize("keep", [slice(0, -100), slice(100, None)])
def test_a_shard_damaged_in_the_store_is_built_again(ray_cluster, folder, tmp_path, capsys, keep):
    manifest = ingest(config(folder, tmp_path))
    whole = contents(tmp_path)
    name = manifest.shards[7].name
    storage_at(tmp_path).put(name, whole[name][keep])
    ingest(config(folder, tmp_path))
    assert contents(tmp_path) == whole


def test_replaced_shards_stay_until_the_ingest_after_the_next(ray_cluster, folder, tmp_path):
    storage = storage_at(tmp_path)
    storage.put("notes.txt", b"mine")
    first = ingest(config(folder, tmp_path))
    reader = ShardReader(storage, first)
    second = ingest(config(folder, tmp_path, size="32x24"))
    assert reader.read(3).image.shape == (3, 48, 64)
    third = ingest(config(folder, tmp_path, size="16x12"))
    names = {shard.name for manifest in (second, third) for shard in manifest.shards}
    assert set(storage.list()) == names | {"manifest.arrow", "notes.txt"}


def test_a_damaged_manifest_is_no_obstacle(ray_cluster, folder, tmp_path):
    ingest(config(folder, tmp_path))
    whole = contents(tmp_path)
    storage_at(tmp_path).put("manifest.arrow", b"damaged")
    ingest(config(folder, tmp_path))
    assert contents(tmp_path) == whole


def test_a_second_ingest_at_once_is_refused(ray_cluster, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    storage = storage_at(tmp_path)
    with contextlib.ExitStack() as first:
        held = first.enter_context(hold_lease(storage))
        with pytest.raises(LeaseError, match=f"being written by {held.owner}"):
            ingest(config(folder, tmp_path))
        assert storage.list() == [held.key]
    ingest(config(folder, tmp_path))
    assert not [name for name in storage.list() if name.startswith("lease")]


def test_a_writer_that_lost_its_place_writes_no_manifest(
    ray_cluster, folder, tmp_path, monkeypatch
):
    storage = storage_at(tmp_path)

    def another_takes_over(*arguments):
        taken = lease.Lease(2, "elsewhere process 1", "token")
        storage.put(taken.key, taken.document(0))
        return convert(*arguments)

    convert = ingest.__globals__["_convert"]
    monkeypatch.setitem(ingest.__globals__, "_convert", another_takes_over)
    with pytest.raises(LeaseError, match="taken over by elsewhere process 1"):
        ingest(config(folder, tmp_path))
    assert not storage.exists("manifest.arrow")


def test_shards_have_about_the_size_that_was_asked_for(ray_cluster, make_folder, tmp_path):
    root = make_folder(tmp_path / "data", count=60, size=(96, 128))
    for size in (None, "64x48"):
        made = ingest(config(root, tmp_path / str(size), size=size, shard_bytes=30_000))
        assert len(made.shards) > 2
        for shard in made.shards[:-1]:
            assert 0.7 * 30_000 < shard.size < 1.5 * 30_000
