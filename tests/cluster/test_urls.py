import os

import pytest

from cluster.storage import StorageConfig, StorageError, open_storage
from cluster.urls import absolute_url, run_url


def test_urls():
    assert absolute_url("s3://bucket/a") == absolute_url("s3://bucket/a//") == "s3://bucket/a"
    assert absolute_url("file:///a/b") == "file:///a/b"
    assert absolute_url("/a/b") == "file:///a/b"
    assert absolute_url("a/b") == f"file://{os.getcwd()}/a/b"
    assert absolute_url("a:b") == f"file://{os.getcwd()}/a%3Ab"


@pytest.mark.parametrize(
    "url", ["ftp://host/a", "gs:///a", "s3:///a", "s3://a b/c", "file://host/a", ""]
)
def test_a_url_nobody_can_read_is_refused(url):
    with pytest.raises(StorageError, match="s3://BUCKET/PREFIX"):
        open_storage(url, StorageConfig())


@pytest.mark.parametrize("url", ["s3:/bucket/a", "S3:bucket", "gs:/a", "az:/a", "file:/a"])
def test_a_url_without_its_slashes_is_no_path(url):
    for read in (absolute_url, lambda url: run_url(url, "runs")):
        with pytest.raises(StorageError, match=rf"'{url}': use s3://BUCKET/PREFIX"):
            read(url)


@pytest.mark.parametrize("path", ["a//b", "/a", "a/../b", "./a", "a\nb"])
def test_a_key_that_a_client_cannot_send_is_refused(path):
    with pytest.raises(StorageError, match="a name between slashes may not be empty") as caught:
        open_storage(f"s3://bucket/{path}", StorageConfig())
    assert "\n" not in str(caught.value)
