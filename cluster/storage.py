"""One small interface over object storage and folders: bytes in, bytes out, errors in one line.

A `Storage` belongs to the process that opened it: the Rust client inside keeps sockets and
threads, and a client that crosses a fork returns other requests' bytes. Send the URL and the
`StorageConfig` to another process and open it there. Credentials never leave the process: they come
from the provider's default chain (`cluster.stores`) and are neither stored in a configuration
nor pickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn

import obstore
import pyarrow as pa
import pyarrow.fs
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore

from cluster import stores
from cluster.errors import StorageError
from cluster.urls import absolute_url, folder_and_key, split_url

DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
# The client's threads belong to the process that first used it.
_client_process: int | None = None


class MissingObjectError(StorageError):
    """The one line of an object that is not there."""


class AccessDeniedError(StorageError):
    """The one line of an object that may not be read or written."""


@dataclass(frozen=True)
class Patience:
    """How long a request may stall, how long it may take, and how often it is sent again."""

    stall_s: float = 20
    request_s: float = 120
    retries: int = 3


@dataclass
class StorageConfig:
    """How object storage is reached. Credentials come from the provider's default chain.

    Attributes:
        endpoint: URL of another server than the provider's own, https:// or http://; default for
            S3: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
        region: S3 region; default: the AWS default chain, else us-east-1.
        path_style: Address S3 buckets as ENDPOINT/BUCKET; false: BUCKET.ENDPOINT.
        anonymous: Send unsigned requests, for public buckets.
        ca_bundle: PEM file, on every node, of an authority to trust for https:// besides the
            public ones; default: AWS_CA_BUNDLE.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = True
    anonymous: bool = False
    ca_bundle: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"storage.endpoint {self.endpoint!r} must start with http:// or https://"
            )


class Storage:
    """The objects below one URL, under keys such as `shard-00000.arrow`. Made by `open_storage`.

    Every method raises StorageError with one line that names the object and the fix.
    """

    def __init__(self, url: str, config: StorageConfig, patience: Patience) -> None:
        self.url = absolute_url(url)
        self._config, self._patience = config, patience
        self._scheme, self._bucket, self._path = split_url(self.url)

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

    def put(self, key: str, data: bytes | pa.Buffer) -> None:
        """Write an object at once: a reader sees the old bytes or the new ones, never a part.

        It outlasts a power cut: an object put after it is never there without it.
        """
        with self._errors_name(key):
            self._write(key, memoryview(data).cast("B"), "overwrite")

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet; False, and nothing written, if it is.

        Of several writers at once one gets True, or none where its reply was lost on the way.
        """
        with self._errors_name(key):
            try:
                self._write(key, memoryview(data), "create")
            except AlreadyExistsError:
                return False
            return True

    def describe(self, key: str) -> tuple[int, str]:
        """The object's size in bytes, and a version that changes with its content."""
        with self._errors_name(key):
            found = obstore.head(self._store, key)
            return found["size"], f"{found['e_tag']} {found['last_modified']}"

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

    def delete_unfinished(self, ours: re.Pattern[str]) -> None:
        """Remove what killed writers left of objects whose whole key matches; `list` hides it.

        For objects that nobody writes meanwhile. What cannot be removed now stays, in a bucket for
        its lifecycle rules: it is in nobody's way.
        """
        if self._scheme == "file":
            root = Path(self._path)
            with suppress(OSError):
                for path in root.rglob("*#*"):  # LocalStore writes NAME#1, then renames
                    key, _, number = path.relative_to(root).as_posix().rpartition("#")
                    if number.isdecimal() and ours.fullmatch(key) and path.is_file():
                        path.unlink()
        elif self._scheme == "s3":
            stores.abort_s3_uploads(self._bucket, self._prefix, ours, self._config)

    def check(self, reads: str | None = None) -> None:
        """Before work starts: does the store answer, does the bucket exist, are we let in?

        Of a place that is only read, `reads` is the key of an object there: whoever may read it
        need not be allowed to list the place. A missing local folder passes (`put` makes it) if it
        could be created. Takes a few seconds at most, whatever is wrong.
        """
        if self._scheme == "file":
            _check_folder(self.url, Path(self._path))
            return
        with self._errors_name(""):
            quick = Patience(stores.CONNECT_TIMEOUT_S, stores.CONNECT_TIMEOUT_S, retries=1)
            store = self._open(quick)
            if reads is not None:
                with suppress(BaseError, OSError):  # the listing tells what is wrong
                    obstore.head(store, reads)
                    return
            if self._scheme != "s3":
                next(iter(obstore.list(store, chunk_size=1)), None)
            elif refusal := stores.s3_refusal(self._bucket, self._prefix, self._config):
                raise StorageError(f"{self.url}: {refusal}")

    def close(self) -> None:
        """Close the connections; a later request opens others."""
        self.__dict__.pop("_store", None)

    def _write(self, key: str, data: memoryview, mode: Literal["create", "overwrite"]) -> None:
        folder = Path(self._path)
        if self._scheme == "file":
            folder.mkdir(parents=True, exist_ok=True)
        obstore.put(self._store, key, data, mode=mode)
        if self._scheme == "file":
            _sync(folder / key)

    @property
    def _prefix(self) -> str:
        """What the bucket's own keys begin with below the URL."""
        return f"{self._path}/" if self._path else ""

    @cached_property
    def _store(self) -> ObjectStore:
        if self._scheme == "file" and not Path(self._path).is_dir():
            raise FileNotFoundError(self._path)
        return self._open(self._patience)

    def _open(self, patience: Patience) -> ObjectStore:
        return stores.open_store(self._scheme, self._bucket, self._path, self._config, patience)

    @contextmanager
    def _errors_name(self, key: str) -> Iterator[None]:
        """Turn what the client raises into one line that names the object."""
        where = f"{self.url}/{key}".rstrip("/")
        _claim_client(where)
        try:
            yield
        except stores.SettingsError as error:
            raise StorageError(f"{self.url}: {error}") from None
        except (BaseError, OSError) as error:
            kind = StorageError
            if isinstance(error, FileNotFoundError):
                kind = MissingObjectError
            elif isinstance(error, DENIED) and not _provider_failure(error):
                kind = AccessDeniedError
            raise kind(f"{where}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        text = str(error)
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            return f"no bucket {self._bucket!r}: create it or fix the URL"
        if isinstance(error, FileNotFoundError):
            return "no such object"
        if cause := _provider_failure(error):
            return stores.aws_failure(cause)
        if isinstance(error, DENIED):
            return f"access denied: {stores.CREDENTIALS_FIX[self._scheme]}"
        if "token request" in text:  # the last link of the chain: a cloud machine's own identity
            return stores.no_credentials(self._scheme)
        if "Account must be specified" in text:
            return "no storage account: set AZURE_STORAGE_ACCOUNT_NAME"
        # The first line only: the rest is the server's XML and the client's debug dump.
        return text.splitlines()[0].split(": <?xml")[0] if text else type(error).__name__


def open_storage(url: str, config: StorageConfig, patience: Patience | None = None) -> Storage:
    """Open `s3://bucket/prefix`, `gs://`, `az://`, `file:///folder`, or a local path.

    Touches nothing yet.

    Raises StorageError for a URL it cannot read.
    """
    return Storage(url, config, patience or Patience())


def read_url(url: str, config: StorageConfig) -> bytes:
    """The one object at a URL or local path. Raises StorageError as `Storage.get` does."""
    folder, key = folder_and_key(url)
    return open_storage(folder, config).get(key)


def pyarrow_filesystem(url: str, config: StorageConfig) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path for Ray Train's `storage_filesystem` and `storage_path`.

    Ray pickles the file system into every worker, so no credentials are put into it: each
    process finds its own.
    """
    scheme, bucket, path = split_url(absolute_url(url))
    filesystem = stores.arrow_filesystem(scheme, config, Patience())
    return filesystem, path if scheme == "file" else f"{bucket}/{path}".rstrip("/")


def _provider_failure(error: Exception) -> str:
    """Why boto3 could not renew its keys, which the client reports as a refusal; else empty."""
    return str(error).partition("for path External AWS credential provider: ")[2].split("\n")[0]


def _claim_client(where: str) -> None:
    """A child of fork has its parent's sockets and none of its threads: it would wait for ever."""
    global _client_process
    if _client_process is None:
        _client_process = os.getpid()
    if _client_process != os.getpid():
        raise StorageError(
            f"{where}: this process was forked from one that had used object storage: "
            "start it with spawn"
        )


def _sync(path: Path) -> None:
    """Bring a file and its name onto the disk."""
    with suppress(FileNotFoundError), path.open("rb") as file:  # a successor may have deleted it
        os.fsync(file.fileno())
    with suppress(OSError):  # not every file system or permission lets one sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_folder(url: str, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise StorageError(f"{url}: {existing} is a file, a folder is needed")
    if existing != folder and not os.access(existing, os.W_OK):
        raise StorageError(f"{url}: no such folder, and {existing} may not be written to")
