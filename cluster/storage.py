"""One small interface over object storage and folders: bytes in, bytes out, errors in one line.

A `Storage` belongs to the process that opened it: the Rust client inside keeps sockets and
threads, and a client that crosses a fork returns other requests' bytes. Send the URL and the
`StorageConfig` to another process and open it there. Credentials never leave the process: they
come from the AWS default chain (environment, profile, web identity, instance role) and are
neither stored in a configuration nor pickled.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import boto3
import botocore.config
import botocore.exceptions
import obstore
import pyarrow.fs
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role "
    "(or --storage.anonymous true for a public bucket)"
)
# A body that stalls is given up after READ_TIMEOUT and asked for again, RETRIES times.
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 20
REQUEST_TIMEOUT_S = 120
RETRIES = 3


class StorageError(ValueError):
    """One line that names the URL or key and the fix."""


class MissingObjectError(StorageError):
    """The one line of an object that is not there."""


@dataclass
class StorageConfig:
    """How object storage is reached. Credentials come from the AWS default chain.

    Attributes:
        endpoint: S3 endpoint URL; default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS.
        region: S3 region; default: the AWS default chain, else us-east-1.
        path_style: Address buckets as ENDPOINT/BUCKET; false: BUCKET.ENDPOINT.
        anonymous: Send unsigned requests, for public buckets.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = True
    anonymous: bool = False

    def __post_init__(self) -> None:
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"storage.endpoint {self.endpoint!r} must start with http:// or https://"
            )


class Storage:
    """The objects below one URL, under keys such as `shard-00000.arrow`. Made by `open_storage`.

    Every method raises StorageError with one line that names the object and the fix.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.url = absolute_url(url).rstrip("/")
        self._config = config
        self._scheme, self._bucket, self._path = _split(self.url)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Storage belongs to one process: send its url and open it there")

    def get(self, key: str) -> bytes:
        """The whole object."""
        with self._errors_name(key):
            return obstore.get(self._store, key).bytes().to_bytes()

    def get_range(self, key: str, offset: int, length: int) -> obstore.Bytes:
        """Bytes offset..offset+length as a buffer; shorter where the object ends before that."""
        with self._errors_name(key):
            return obstore.get_range(self._store, key, start=offset, length=length)

    def put(self, key: str, data: bytes) -> None:
        """Write an object at once: a reader sees the old bytes or the new ones, never a part."""
        with self._errors_name(key):
            if self._scheme == "file":
                Path(self._path).mkdir(parents=True, exist_ok=True)
            obstore.put(self._store, key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet; False, and nothing written, if it is.

        Of several writers at once one gets True, or none where its reply was lost on the way.
        """
        with self._errors_name(key):
            if self._scheme == "file":
                Path(self._path).mkdir(parents=True, exist_ok=True)
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        with self._errors_name(key):
            try:
                obstore.head(self._store, key)
            except FileNotFoundError:
                return False
            return True

    def list(self, prefix: str = "") -> list[str]:
        """Sorted keys below the folder `prefix`, relative to the URL."""
        if self._scheme == "file" and not Path(self._path).is_dir():
            return []
        with self._errors_name(prefix):
            pages = obstore.list(self._store, prefix=prefix or None)
            return sorted(entry["path"] for page in pages for entry in page)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        with self._errors_name(key), suppress(FileNotFoundError):
            obstore.delete(self._store, key)

    def delete_unfinished(self) -> None:
        """Remove what killed writers left: parts of objects, which `list` never shows.

        For a place that nobody writes to meanwhile. In a bucket that lets us neither list nor
        abort uploads they stay, for its lifecycle rules.
        """
        if self._scheme == "file":
            for path in Path(self._path).rglob("*#*"):
                if re.fullmatch(r".+#\d+", path.name):  # LocalStore writes NAME#1, then renames
                    path.unlink(missing_ok=True)
            return
        client = _s3_client(self._config)
        where = {"Bucket": self._bucket, "Prefix": f"{self._path}/".lstrip("/")}
        with suppress(botocore.exceptions.ClientError):
            for page in client.get_paginator("list_multipart_uploads").paginate(**where):
                for upload in page.get("Uploads", []):
                    name = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    client.abort_multipart_upload(Bucket=self._bucket, **name)
        client.close()

    def check(self) -> None:
        """Before work starts: does the store answer, does the bucket exist, are we let in?

        A missing local folder passes (`put` makes it) if it could be created. Takes a few
        seconds at most, whatever is wrong.
        """
        if self._scheme == "file":
            _check_folder(self.url, Path(self._path))
        else:
            _check_bucket(self.url, self._bucket, self._config)

    @cached_property
    def _store(self) -> LocalStore | S3Store:
        if self._scheme == "file":
            if not Path(self._path).is_dir():
                raise FileNotFoundError(self._path)
            return LocalStore(prefix=self._path)
        return _s3_store(self.url, self._bucket, self._path, self._config)

    @contextmanager
    def _errors_name(self, key: str) -> Iterator[None]:
        """Turn what the client raises into one line that names the object."""
        try:
            yield
        except (BaseError, OSError) as error:
            where = f"{self.url}/{key}".rstrip("/")
            missing = isinstance(error, FileNotFoundError)
            kind = MissingObjectError if missing else StorageError
            raise kind(f"{where}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        text = str(error)
        if "NoSuchBucket" in text:
            return f"no bucket {self._bucket!r}: create it or fix the URL"
        if isinstance(error, FileNotFoundError):
            return "no such object"
        if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
            fix = CREDENTIALS_FIX if self._scheme == "s3" else "change the folder's permissions"
            return f"access denied: {fix}"
        # The first line only: the rest is the server's XML and the client's debug dump.
        return text.splitlines()[0].split(": <?xml")[0] if text else type(error).__name__


def open_storage(url: str, config: StorageConfig) -> Storage:
    """Open `s3://bucket/prefix`, `file:///folder`, or a local path. Touches nothing yet.

    Raises StorageError for a URL it cannot read.
    """
    return Storage(url, config)


def read_url(url: str, config: StorageConfig) -> bytes:
    """The one object at a URL or local path. Raises StorageError as `Storage.get` does."""
    url = absolute_url(url)
    key = PurePosixPath(_split(url)[2]).name
    return open_storage(url.rpartition("/")[0], config).get(key)


def absolute_url(url: str) -> str:
    """A local path as an absolute `file://` URL, so that it means the same everywhere."""
    if "://" in url:
        return url
    if not url:
        raise StorageError("an empty storage URL: give s3://BUCKET/PREFIX or a folder")
    return Path(url).absolute().as_uri()


def pyarrow_filesystem(url: str, config: StorageConfig) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path for Ray Train's `storage_filesystem` and `storage_path`.

    Ray pickles the file system into every worker, so no credentials are put into it: each
    process finds its own through the AWS default chain.
    """
    scheme, bucket, path = _split(absolute_url(url).rstrip("/"))
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), path
    endpoint = urllib.parse.urlsplit(_endpoint(config) or "")
    filesystem = pyarrow.fs.S3FileSystem(
        anonymous=config.anonymous,
        region=_region(config),
        scheme=endpoint.scheme or "https",
        endpoint_override=endpoint.netloc or None,
        force_virtual_addressing=not config.path_style,
    )
    return filesystem, f"{bucket}/{path}".rstrip("/")


def _split(url: str) -> tuple[str, str, str]:
    """`s3://bucket/a/b` -> (s3, bucket, a/b); `file:///a/b` -> (file, "", /a/b)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file" and not parts.netloc:
        return "file", "", urllib.parse.unquote(parts.path) or "/"
    if parts.scheme == "s3" and parts.netloc:
        return "s3", parts.netloc, parts.path.strip("/")
    raise StorageError(f"cannot read the URL {url!r}: use s3://BUCKET/PREFIX or file:///FOLDER")


def _endpoint(config: StorageConfig) -> str | None:
    variables = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    return config.endpoint or next(filter(None, variables), None)


def _region(config: StorageConfig) -> str:
    return config.region or boto3.Session().region_name or "us-east-1"


def _s3_store(url: str, bucket: str, prefix: str, config: StorageConfig) -> S3Store:
    options = {"region": _region(config), "virtual_hosted_style_request": not config.path_style}
    if endpoint := _endpoint(config):
        options["aws_endpoint_url_s3"] = endpoint  # the key that wins over the environment
    provider = None
    if config.anonymous:
        options["skip_signature"] = True
    else:
        try:
            provider = Boto3CredentialProvider(boto3.Session())
        except ValueError:
            raise StorageError(f"{url}: no AWS credentials: {CREDENTIALS_FIX}") from None
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=options,
        credential_provider=provider,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
        },
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=60)},
    )


def _s3_client(config: StorageConfig) -> Any:
    # A new session: boto3's default one keeps its first credentials.
    return boto3.Session().client(
        "s3",
        endpoint_url=_endpoint(config),
        region_name=_region(config),
        config=botocore.config.Config(
            signature_version=botocore.UNSIGNED if config.anonymous else None,
            s3={"addressing_style": "path" if config.path_style else "virtual"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=CONNECT_TIMEOUT_S,
            retries={"total_max_attempts": 2},
        ),
    )


def _check_folder(url: str, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise StorageError(f"{url}: {existing} is a file, a folder is needed")
    if existing != folder and not os.access(existing, os.W_OK):
        raise StorageError(f"{url}: no such folder, and {existing} may not be written to")


def _check_bucket(url: str, bucket: str, config: StorageConfig) -> None:
    if not config.anonymous and boto3.Session().get_credentials() is None:
        raise StorageError(f"{url}: no AWS credentials: {CREDENTIALS_FIX}")
    client = _s3_client(config)
    endpoint = client.meta.endpoint_url
    try:
        client.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        reasons = {
            404: f"no bucket {bucket!r} at {endpoint}: create it, or fix the URL or the endpoint",
            403: f"access to bucket {bucket!r} denied at {endpoint}: {CREDENTIALS_FIX}",
            301: f"bucket {bucket!r} lives in another region: set --storage.region",
        }
        reason = reasons.get(status, f"{endpoint} answers {status}: check --storage.endpoint")
        raise StorageError(f"{url}: {reason}") from None
    except botocore.exceptions.BotoCoreError as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{url}: {reason}: check --storage.endpoint") from None
    finally:
        client.close()
