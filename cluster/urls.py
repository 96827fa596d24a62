"""Addresses: URLs of folders and objects, local paths, names of runs."""

import re
import urllib.parse
from pathlib import Path, PurePosixPath

from cluster.errors import StorageError

BUCKET = re.compile(r"[\w.$-]+", re.ASCII)
# What was meant as a URL, but would be a path.
NO_SLASHES = re.compile(r"(s3a?|gs|gcs|az|abfss?|file|https?):(?!//)", re.IGNORECASE)
NO_KEY = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")


def absolute_url(url: str) -> str:
    """A local path as an absolute `file://` URL, so that it means the same everywhere.

    Ends with no slash, so that a key can be joined by one.
    """
    if NO_SLASHES.match(url):
        raise _unreadable(url)
    if "://" in url:
        return re.sub(r"(?<=[^:/])/+$", "", url)
    if not url:
        raise StorageError("an empty storage URL: give s3://BUCKET/PREFIX or a folder")
    return Path(url).absolute().as_uri()


def folder_and_key(url: str) -> tuple[str, str]:
    """Where the one object at a URL or local path lies: its folder's URL, and its key there."""
    url = absolute_url(url)
    return url.rpartition("/")[0], PurePosixPath(split_url(url)[2]).name


def run_url(run: str, runs: str) -> str:
    """URL of a run: `run` itself if it is a URL or path, else a folder below `runs`."""
    named = "/" not in run and not NO_SLASHES.match(run)
    return absolute_url(f"{runs.rstrip('/')}/{run}" if named else run)


def split_url(url: str) -> tuple[str, str, str]:
    """`s3://bucket/a/b` -> (s3, bucket, a/b); `file:///a/b` -> (file, "", /a/b).

    A key may hold # and ?: they begin nothing here.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    scheme = scheme.lower()
    if scheme == "file" and not bucket:
        return "file", "", f"/{urllib.parse.unquote(path)}"
    if scheme in ("s3", "gs", "az") and BUCKET.fullmatch(bucket):
        if path and NO_KEY.search(path):
            raise StorageError(
                f"cannot read the URL {url!r}: a name between slashes may not be empty, . or .., "
                "nor hold control characters"
            )
        return scheme, bucket, path
    raise _unreadable(url)


def _unreadable(url: str) -> StorageError:
    return StorageError(
        f"cannot read the URL {url!r}: use s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, "
        "az://CONTAINER/PREFIX or file:///FOLDER"
    )
