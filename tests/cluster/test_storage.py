"""Folders and buckets behave alike, and what is wrong with either is one line within seconds."""

import base64
import json
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time

import pyarrow.fs
import pytest

from cluster import stores
from cluster.ingest import WRITTEN
from cluster.storage import StorageConfig, StorageError, open_storage, pyarrow_filesystem
from cluster.urls import folder_and_key
from tests.cluster.object_server import ObjectServer, serving

SERVICE_ACCOUNT = {
    "private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True
}  # fmt: skip


@pytest.fixture
def object_server(monkeypatch):
    """In place of Google Cloud Storage and Azure, with credentials for both."""
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(SERVICE_ACCOUNT))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"azure-secret").decode())
    with serving(ObjectServer()) as server:
        yield server


@pytest.fixture(params=["file", "s3", "gs", "az"])
def storage(request, tmp_path):
    if request.param == "file":
        return open_storage(str(tmp_path / "data"), StorageConfig())
    if request.param in ("gs", "az"):
        server = request.getfixturevalue("object_server")
        return open_storage(f"{request.param}://bucket/some/prefix", StorageConfig(server.url))
    server = request.getfixturevalue("s3")
    bucket = server.make_bucket(f"storage-{time.time_ns()}")
    return open_storage(f"{bucket}/some/prefix", StorageConfig(endpoint=server.endpoint))


def test_objects_round_trip(storage):
    storage.put("a/b.bin", bytes(range(100)))
    storage.put("c.bin", b"c")
    assert storage.get("a/b.bin") == bytes(range(100))
    assert bytes(storage.get_range("a/b.bin", 10, 5)) == bytes(range(10, 15))
    assert storage.list() == ["a/b.bin", "c.bin"]
    assert storage.list("a") == ["a/b.bin"]
    assert storage.exists("c.bin") and not storage.exists("d.bin")
    storage.put("c.bin", b"replaced")
    assert storage.get("c.bin") == b"replaced"
    storage.delete("c.bin")
    storage.delete("c.bin")
    assert not storage.exists("c.bin")


def test_a_range_past_the_end_is_short(storage):
    storage.put("a", b"0123456789")
    assert bytes(storage.get_range("a", 8, 10)) == b"89"


def test_an_empty_place_lists_nothing_and_passes_its_check(storage):
    storage.check()
    assert storage.list() == []
    assert not storage.exists("a")


def test_a_missing_object_is_named_with_its_url(storage):
    for read in (lambda: storage.get("no/such"), lambda: storage.get_range("no/such", 0, 1)):
        with pytest.raises(StorageError) as caught:
            read()
        assert str(caught.value) == f"{storage.url}/no/such: no such object"


@pytest.mark.parametrize("storage", ["file", "s3"], indirect=True)
def test_what_a_killed_writer_left_is_removed(storage, s3, tmp_path):
    """Google and Azure show nothing of an upload that was never completed."""

    def unfinished() -> list:
        if storage.url.startswith("file:"):
            return list((tmp_path / "data").rglob("*#*"))
        bucket = storage.url.split("/")[2]
        return s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])

    storage.put("small", b"kept")
    code = (
        "import sys; from cluster.storage import StorageConfig, open_storage; "
        "storage = open_storage(sys.argv[1], StorageConfig()); "
        "[storage.put('folder/large', bytes(1 << 28)) for _ in range(100)]"
    )
    environment = {**os.environ, "AWS_ENDPOINT_URL_S3": s3.endpoint}
    with subprocess.Popen([sys.executable, "-c", code, storage.url], env=environment) as writer:
        while not unfinished():
            assert writer.poll() is None
        writer.kill()
    assert unfinished()
    storage.delete_unfinished(re.compile("folder/large"))
    assert not unfinished()
    assert storage.get("small") == b"kept"


@pytest.mark.parametrize("storage", ["file", "s3"], indirect=True)
def test_what_is_not_an_ingest_s_own_stays_unfinished(storage, s3, tmp_path):
    ours = ["manifest.arrow", "shard-00000-0-0.arrow"]
    others = ["night/manifest.arrow", "night/shard-00000-0-0.arrow", "shard-0/a.arrow", "track"]
    if storage.url.startswith("file:"):
        root = tmp_path / "data"
        for name in others + ours:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}#2").write_bytes(b"part")
        (root / "shard-00001-0-0.arrow#1").mkdir()
    else:
        bucket, client = storage.url.split("/")[2], s3.client()
        for name in others + ours:
            client.create_multipart_upload(Bucket=bucket, Key=f"some/prefix/{name}")
    storage.delete_unfinished(WRITTEN)
    if storage.url.startswith("file:"):
        left = [str(path.relative_to(root))[:-2] for path in root.rglob("*#2")]
    else:
        uploads = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        left = [upload["Key"].removeprefix("some/prefix/") for upload in uploads]
    assert sorted(left) == others


def test_what_is_left_unfinished_where_nobody_answers_is_no_error(unused_port):
    config = StorageConfig(endpoint=f"http://127.0.0.1:{unused_port}")
    open_storage("s3://bucket/a", config).delete_unfinished(WRITTEN)


def test_a_file_and_its_name_are_on_the_disk_once_they_are_written(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if os.path.isdir(synced[-1]):
            raise OSError("this file system syncs no folders")

    monkeypatch.setattr(os, "fsync", fsync)
    storage = open_storage(str(tmp_path), StorageConfig())
    storage.put("a/shard", b"1")
    storage.create("lease", b"2")
    assert synced == [str(tmp_path / name) for name in ("a/shard", "a", "lease", "")]


def test_a_storage_is_not_pickled(storage):
    with pytest.raises(TypeError, match="belongs to one process"):
        pickle.dumps(storage)


def test_a_forked_child_is_told_to_spawn(storage):
    """It has none of the client's threads: without the check it waits for ever."""
    storage.put("a", b"1")

    def read(connection):
        try:
            connection.send(open_storage(storage.url, storage._config).get("a"))
        except StorageError as error:
            connection.send(str(error))

    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=read, args=(there,), daemon=True)
    child.start()
    assert here.poll(20) and "start it with spawn" in here.recv()
    child.join()


def test_readers_see_whole_objects_while_a_writer_replaces_them(storage):
    versions = [bytes([i]) * 300_000 for i in range(2)]
    storage.put("object", versions[0])
    writer = threading.Thread(
        target=lambda: [storage.put("object", versions[i % 2]) for i in range(60)]
    )
    writer.start()
    while writer.is_alive():
        assert storage.get("object") in versions
    writer.join()


def test_a_path_with_spaces_and_signs(tmp_path):
    storage = open_storage(str(tmp_path / "a b#c?%20"), StorageConfig())
    storage.put("x", b"1")
    assert (tmp_path / "a b#c?%20" / "x").read_bytes() == b"1"
    assert open_storage(f"file://{tmp_path}/a b#c?%2520", StorageConfig()).get("x") == b"1"
    folder, key = folder_and_key(str(tmp_path / "a b#c?%20" / "y %20#?"))
    open_storage(folder, StorageConfig()).put(key, b"2")
    assert (tmp_path / "a b#c?%20" / "y %20#?").read_bytes() == b"2"


@pytest.mark.parametrize("storage", ["s3", "gs", "az"], indirect=True)
def test_signs_in_a_url_are_part_of_the_key(storage):
    for number in (1, 2):
        place = open_storage(f"{storage.url}/day #{number}?a=%20", storage._config)
        place.put("x", b"%d" % number)
        assert place.list() == ["x"] and place.get("x") == b"%d" % number
        filesystem, path = pyarrow_filesystem(place.url, storage._config)
        with filesystem.open_input_stream(f"{path}/x") as stream:
            assert stream.read() == b"%d" % number
    assert storage.list() == ["day #1?a=%20/x", "day #2?a=%20/x"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file, a folder is needed"):
        open_storage(str(tmp_path / "file" / "data"), StorageConfig()).check()


def refusal(url, config):
    """The message of a failed check, which must come fast, in one line, without a secret."""
    begin = time.monotonic()
    with pytest.raises(StorageError) as caught:
        open_storage(url, config).check()
    message = str(caught.value)
    assert time.monotonic() - begin < 10
    assert "\n" not in message and url in message
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert name not in os.environ or os.environ[name] not in message
    return message


def test_a_missing_bucket_is_said(s3):
    message = refusal("s3://no-such-bucket/a", StorageConfig(endpoint=s3.endpoint))
    assert "no bucket 'no-such-bucket'" in message and s3.endpoint in message


def test_a_wrong_secret_is_said(s3, monkeypatch):
    url = s3.make_bucket("wrong-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    config = StorageConfig(endpoint=s3.endpoint)
    assert "access to bucket 'wrong-secret' denied" in refusal(url, config)
    with pytest.raises(StorageError, match="access denied: set AWS_ACCESS_KEY_ID") as caught:
        open_storage(url, config).put("a", b"1")
    assert "another-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_missing_credentials_are_said(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    config = StorageConfig(endpoint=s3.endpoint)
    assert "no AWS credentials" in refusal("s3://bucket/a", config)
    with pytest.raises(StorageError, match="no AWS credentials"):
        open_storage("s3://bucket/a", config).get("key")


def test_a_wrong_endpoint_is_said(unused_port):
    config = StorageConfig(endpoint=f"http://127.0.0.1:{unused_port}")
    assert "check --storage.endpoint" in refusal("s3://bucket/a", config)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="s3://bucket/a/key"):
        open_storage("s3://bucket/a", config).get("key")
    assert time.monotonic() - begin < 10


def test_an_endpoint_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(stores, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = StorageConfig(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "check --storage.endpoint" in refusal("s3://bucket/a", config)


def test_an_endpoint_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="must start with http"):
        StorageConfig(endpoint="localhost:9000")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_may_come_from_the_environment(s3, monkeypatch, name):
    url = s3.make_bucket(f"from-{name.lower().replace('_', '-')}")
    monkeypatch.setenv(name, s3.endpoint)
    storage = open_storage(url, StorageConfig())
    storage.check()
    storage.put("a", b"1")
    assert storage.get("a") == b"1"
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    storage = open_storage(url, StorageConfig(endpoint=s3.endpoint))
    storage.check()
    assert storage.get("a") == b"1"


def test_the_file_system_for_ray_reads_the_same_objects_and_carries_no_secret(storage):
    storage.put("a.bin", b"123")
    config = storage._config
    filesystem, path = pyarrow_filesystem(storage.url, config)
    pickled = pickle.dumps(filesystem)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name].encode() not in pickled
    restored = pickle.loads(pickled)
    assert isinstance(restored, pyarrow.fs.FileSystem)
    with restored.open_input_stream(f"{path}/a.bin") as stream:
        assert stream.read() == b"123"
