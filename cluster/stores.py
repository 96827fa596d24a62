"""The clients of each kind of store: S3, Google Cloud Storage, Azure Blob Storage, folders.

Credentials are found by each provider's own chain in the process that makes the client: boto3's
for S3, application default credentials for Google, and for Azure the account key, SAS token,
service principal, workload or managed identity in the environment.
"""

from __future__ import annotations

import os
import re
import ssl
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import botocore.config
import botocore.exceptions
import botocore.session
import pyarrow.fs
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.fsspec import FsspecStore
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

if TYPE_CHECKING:
    from cluster.storage import Patience, StorageConfig

CREDENTIALS_FIX = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role "
    "(or --storage.anonymous true for a public bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run "
    "`gcloud auth application-default login` (or --storage.anonymous true for a public bucket)",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or an identity's AZURE_CLIENT_ID "
    "and AZURE_TENANT_ID (or --storage.anonymous true for a public container)",
    "file": "change the folder's permissions",
}
CONNECT_TIMEOUT_S = 3
AWS_ERRORS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
# boto3 renews a role's keys when ten minutes of them are left, so whoever has just asked it may use
# them for so long. The client would by default keep them for half an hour.
KEYS_LAST = timedelta(minutes=10)


class SettingsError(ValueError):
    """What this machine's credentials, profile or certificates lack, in one line."""


def no_credentials(scheme: str) -> str:
    """The line for a chain that ends without credentials."""
    provider = {"s3": "AWS", "gs": "Google", "az": "Azure"}[scheme]
    return f"no {provider} credentials: {CREDENTIALS_FIX[scheme]}"


def aws_failure(cause: str) -> str:
    """The line for a chain that cannot be followed."""
    return f"AWS credentials: {' '.join(cause.split())}: check the AWS_ variables and ~/.aws"


def open_store(
    scheme: str, bucket: str, path: str, config: StorageConfig, patience: Patience
) -> ObjectStore:
    """The client for the objects below `path`. Raises SettingsError for what shows now."""
    if scheme == "file":
        return LocalStore(prefix=path)
    options: dict[str, Any] = {"prefix": path or None, "config": _options(scheme, config)}
    if scheme == "s3":
        if not config.anonymous:
            with _settings_named():
                options["credential_provider"] = _aws_credentials(boto3.Session())
        return S3Store(bucket, **options, **_client(config, patience))
    return {"gs": GCSStore, "az": AzureStore}[scheme](
        bucket, **options, **_client(config, patience)
    )


def arrow_filesystem(
    scheme: str, config: StorageConfig, patience: Patience
) -> pyarrow.fs.FileSystem:
    """A file system whose paths are BUCKET/KEY. Its pickle carries no credentials."""
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem()
    if scheme == "s3":
        endpoint = urllib.parse.urlsplit(s3_endpoint(config) or "")
        return pyarrow.fs.S3FileSystem(
            anonymous=config.anonymous,
            region=s3_region(config),
            scheme=endpoint.scheme or "https",
            endpoint_override=endpoint.netloc or None,
            force_virtual_addressing=not config.path_style,
            tls_ca_file_path=_ca_bundle(config),
        )
    # Arrow's own clients for these two know fewer kinds of credentials than obstore's.
    store = FsspecStore(scheme, config=_options(scheme, config), **_client(config, patience))
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store))


def s3_endpoint(config: StorageConfig) -> str | None:
    variables = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    return config.endpoint or next(filter(None, variables), None)


def s3_region(config: StorageConfig) -> str:
    # Registering its handlers takes most of a session's 20 ms, and a setting needs none.
    session = botocore.session.Session(include_builtin_handlers=False)
    with _settings_named():
        return config.region or session.get_config_variable("region") or "us-east-1"


def s3_refusal(bucket: str, prefix: str, config: StorageConfig) -> str | None:
    """Why S3 does not let us list below a prefix, within seconds; None if it does."""
    client = _s3_admin(config)
    endpoint = client.meta.endpoint_url
    try:
        client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    except botocore.exceptions.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        reasons = {
            404: f"no bucket {bucket!r} at {endpoint}: create it, or fix the URL or the endpoint",
            403: f"access to bucket {bucket!r} denied at {endpoint}: {CREDENTIALS_FIX['s3']}",
            301: f"bucket {bucket!r} lives in another region: set --storage.region",
        }
        return reasons.get(status, f"{endpoint} answers {status}: check --storage.endpoint")
    except botocore.exceptions.BotoCoreError as error:
        return f"{' '.join(str(error).split())}: check --storage.endpoint"
    finally:
        client.close()
    return None


def abort_s3_uploads(
    bucket: str, prefix: str, ours: re.Pattern[str], config: StorageConfig
) -> None:
    """End the unfinished uploads of keys that match below a prefix; where that fails they stay."""
    with suppress(*AWS_ERRORS, SettingsError), closing(_s3_admin(config)) as client:
        pages = client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if ours.fullmatch(upload["Key"].removeprefix(prefix)):
                    name = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    client.abort_multipart_upload(Bucket=bucket, **name)


def _s3_admin(config: StorageConfig) -> Any:
    """boto3's client, for what is no object. Raises SettingsError."""
    with _settings_named():
        session = boto3.Session()  # a new one: boto3's default session keeps its first credentials
        if not config.anonymous:
            _aws_credentials(session)()  # what fails here is not the store's refusal
    return session.client(
        "s3",
        endpoint_url=s3_endpoint(config),
        region_name=s3_region(config),
        verify=_ca_bundle(config),
        config=botocore.config.Config(
            signature_version=botocore.UNSIGNED if config.anonymous else None,
            s3={"addressing_style": "path" if config.path_style else "virtual"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=CONNECT_TIMEOUT_S,
            retries={"total_max_attempts": 2},
        ),
    )


def _aws_credentials(session: boto3.Session) -> Boto3CredentialProvider:
    """Follow the chain to its credentials; each call of what is returned gives those of now."""
    try:
        return Boto3CredentialProvider(session, ttl=KEYS_LAST)
    except ValueError:
        raise SettingsError(no_credentials("s3")) from None


@contextmanager
def _settings_named() -> Iterator[None]:
    """Name the profile, file or service that botocore finds at fault."""
    try:
        yield
    except (*AWS_ERRORS, OSError) as error:
        raise SettingsError(aws_failure(str(error))) from None


def _options(scheme: str, config: StorageConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"skip_signature": True} if config.anonymous else {}
    if scheme == "s3":
        options["region"] = s3_region(config)
        options["virtual_hosted_style_request"] = not config.path_style
        if endpoint := s3_endpoint(config):
            options["aws_endpoint_url_s3"] = endpoint  # the key that wins over the environment
    elif config.endpoint:
        options["base_url" if scheme == "gs" else "endpoint"] = config.endpoint
    return options


def _client(config: StorageConfig, patience: Patience) -> dict[str, Any]:
    """How the HTTP client connects, waits and repeats."""
    client = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=patience.stall_s),
        "timeout": timedelta(seconds=patience.request_s),
    }
    if bundle := _ca_bundle(config):
        client["root_certificate"] = Path(bundle).read_bytes()
    return {
        "client_options": client,
        "retry_config": {
            "max_retries": patience.retries,
            "retry_timeout": timedelta(seconds=60),
        },
    }


def _ca_bundle(config: StorageConfig) -> str | None:
    """The PEM file to trust. Raises SettingsError for one that cannot be read or holds nothing."""
    bundle = config.ca_bundle or os.environ.get("AWS_CA_BUNDLE")
    if bundle:
        try:
            ssl.create_default_context(cafile=bundle)
        except OSError as error:
            no_pem = isinstance(error, ssl.SSLError)
            reason = "holds no PEM certificates" if no_pem else error.strerror
            fix = "correct --storage.ca_bundle or AWS_CA_BUNDLE"
            raise SettingsError(f"CA bundle {bundle}: {reason}: {fix}") from None
    return bundle
