"""`python -m jobs.ingest verify` names every sample that is not what was written."""

import re

import pytest

from cluster.ingest import IngestConfig, ingest
from cluster.storage import StorageConfig, open_storage
from cluster.verification import VerifyConfig, find
from jobs.command_line import run
from jobs.ingest import report
from tests.processes import run_module


def user_verifies(*arguments):
    return run_module("jobs.ingest", ["verify", *map(str, arguments)])


def exit_code(*arguments):
    """The same without a process of its own."""
    words = [str(argument) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        run(report, VerifyConfig, check=find, arguments=words, command="verify")
    return caught.value.code


@pytest.fixture
def data_set(ray_cluster, folder, tmp_path):
    """Storage and manifest of 12 samples in several shards."""
    manifest = ingest(IngestConfig(root=str(folder), to=str(tmp_path), shard_bytes=8000))
    assert 2 < len(manifest.shards) < 12
    return open_storage(str(tmp_path), StorageConfig()), manifest


def damage(storage, name, place):
    data = bytearray(storage.get(name))
    data[place] ^= 1
    storage.put(name, bytes(data))


def test_an_intact_data_set_in_a_bucket(joined, folder, s3):
    config = StorageConfig(endpoint=s3.endpoint)
    url = f"{s3.make_bucket('verify')}/day"
    made = ingest(IngestConfig(root=str(folder), to=url, shard_bytes=8000, storage=config))
    done = user_verifies(url, "--storage.endpoint", s3.endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"12 images in {len(made.shards)} shards of {url} are intact\n"
    assert re.search(r"verify: 100% 12/12 .*(image/s|s/image)", done.stderr)


def test_every_damaged_sample_is_reported_by_its_key(joined, data_set):
    storage, manifest = data_set
    flipped, missing, truncated = manifest.shards[0], manifest.shards[1], manifest.shards[-1]
    damage(storage, flipped.name, int(manifest.offsets[0]) + 300)
    storage.delete(missing.name)
    storage.put(truncated.name, storage.get(truncated.name)[: int(manifest.offsets[11]) + 9])
    done = user_verifies(storage.url)
    assert done.returncode == 1
    reports = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    lost = [manifest.keys[i] for i in range(12) if manifest.shard[i] == 1]
    assert list(reports) == ["frame000", *lost, "frame011"]
    assert re.fullmatch(rf"{flipped.name}: bytes \d+\+\d+ fail their checksum", reports["frame000"])
    assert reports[lost[0]].endswith(f"{missing.name}: no such object")
    assert reports["frame011"].startswith(f"{truncated.name} ends before byte")
    assert done.stderr.splitlines()[-1] == (
        f"error: {2 + len(lost)} damaged of 12 images in {len(manifest.shards)} shards of "
        f"{storage.url}: ingest it again"
    )


def test_damage_outside_the_samples_is_reported_by_the_shard(data_set, capsys):
    storage, manifest = data_set
    damage(storage, manifest.shards[1].name, 3)
    capsys.readouterr()
    assert exit_code(storage.url) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"{manifest.shards[1].name}: its bytes outside the samples")


def test_nothing_to_verify_is_one_line_before_work_starts(tmp_path, capsys):
    assert exit_code(tmp_path / "nothing") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(r"error: no manifest at file://.*\n", shown.err)
