"""Every provider's chain of credentials is followed, and where it ends is one line with the fix."""

import base64
import json
import shutil
import ssl
import subprocess
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster import ranges, stores
from cluster.storage import (
    AccessDeniedError,
    StorageConfig,
    StorageError,
    open_storage,
    pyarrow_filesystem,
)
from tests.cluster.object_server import ObjectServer, serving
from tests.s3_server import ACCESS_KEY, SECRET_KEY


@pytest.fixture
def no_keys(monkeypatch, unused_port):
    """No credentials in the environment, and no cloud machine that would give any."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{unused_port}")
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")


def works(url, config):
    storage = open_storage(url, config)
    storage.check()
    storage.put("object", b"1")
    return storage.get("object") == b"1"


def refusals(url, config=None):
    """The one line of a check, and of a first request."""
    for use in (lambda storage: storage.check(), lambda storage: storage.get("object")):
        with pytest.raises(StorageError) as caught:
            use(open_storage(url, config or StorageConfig()))
        assert "\n" not in str(caught.value)
        yield str(caught.value)


def test_a_profile(s3, no_keys, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        f"[other]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    url, config = s3.make_bucket("profile"), StorageConfig(endpoint=s3.endpoint)
    assert "no AWS credentials" in next(refusals(url, config))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert works(url, config)


class _TokenService(HTTPServer):
    """Changes a web identity's token into the keys of the test server, unless it is to fail."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.expiry = datetime.now(timezone.utc) + timedelta(days=1)
        self.failures = 0


class _TokenHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert "Action=AssumeRoleWithWebIdentity" in form and "WebIdentityToken=my-token" in form
        if self.server.failures:
            self.server.failures -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        expiry = self.server.expiry.strftime("%Y-%m-%dT%H:%M:%SZ")
        body = (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{ACCESS_KEY}</AccessKeyId><SecretAccessKey>{SECRET_KEY}"
            f"</SecretAccessKey><SessionToken></SessionToken><Expiration>{expiry}</Expiration>"
            "</Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def token_service(no_keys, monkeypatch, tmp_path):
    """What a web identity's token is sent to."""
    (tmp_path / "token").write_text("my-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving(_TokenService()) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server_port}")
        yield service


def test_a_web_identity(s3, token_service):
    assert works(s3.make_bucket("web-identity"), StorageConfig(endpoint=s3.endpoint))


def test_keys_that_cannot_be_renewed_for_a_moment_are_asked_for_again(
    s3, token_service, monkeypatch
):
    monkeypatch.setattr(stores, "KEYS_LAST", timedelta(0))
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(ranges, name, 0.01)
    url, config = s3.make_bucket("renewal"), StorageConfig(endpoint=s3.endpoint)
    token_service.expiry = datetime.now(timezone.utc) + timedelta(minutes=5)  # renewed each time
    assert works(url, config)
    reader = ranges.RangeReader(open_storage(url, config, ranges.PATIENCE))
    token_service.failures = 2
    assert bytes(reader.read("object", 0, 1, lambda body: None)) == b"1"
    assert reader.counters.take()["retries"] == 2
    token_service.failures = 100
    message = r"renewal/object: AWS credentials: .*503.*10 attempts"
    with pytest.raises(StorageError, match=message) as caught:
        reader.read("object", 0, 1, lambda body: None)
    assert not isinstance(caught.value, AccessDeniedError) and "\n" not in str(caught.value)
    assert "503" in next(refusals(url, config))


class _MetadataService(BaseHTTPRequestHandler):
    """Gives a cloud machine the keys of its role, which end in eleven minutes."""

    def _answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self):
        self._answer("session")

    def do_GET(self):
        assert self.headers["x-aws-ec2-metadata-token"] == "session"
        keys = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY, "Token": ""}
        keys |= {"Code": "Success", "Expiration": self.server.expiry.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._answer("role" if self.path.endswith("/") else json.dumps(keys))

    def log_message(self, *arguments):
        pass


def test_an_instance_role_whose_keys_are_renewed_before_they_end(s3, no_keys, monkeypatch):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    with serving(HTTPServer(("127.0.0.1", 0), _MetadataService)) as service:
        service.expiry = datetime.now(timezone.utc) + timedelta(minutes=11)
        place = f"http://127.0.0.1:{service.server_port}/"
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", place)
        url, config = s3.make_bucket("instance-role"), StorageConfig(endpoint=s3.endpoint)
        assert works(url, config)
        keys = open_storage(url, config)._store.credential_provider()
        assert keys["expires_at"] < service.expiry


def test_an_azure_account_key(no_keys, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"secret").decode())
    with serving(ObjectServer()) as server:
        assert works("az://container/a", StorageConfig(server.url))
        assert all(sent.startswith("SharedKey account:") for _, _, sent in server.requests)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_public_bucket_is_read_without_a_signature(no_keys, scheme):
    with serving(ObjectServer()) as server:
        server.objects["bucket/a/object"] = b"1"
        storage = open_storage(f"{scheme}://bucket/a", StorageConfig(server.url, anonymous=True))
        storage.check()
        assert storage.list() == ["object"] and storage.get("object") == b"1"
        assert {sent for _, _, sent in server.requests} == {None}


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_whoever_may_read_an_object_need_not_list(no_keys, scheme):
    with serving(ObjectServer()) as server:
        server.objects["bucket/a/object"] = b"1"
        server.listable = "elsewhere/"
        storage = open_storage(f"{scheme}://bucket/a", StorageConfig(server.url, anonymous=True))
        storage.check("object")
        assert storage.get("object") == b"1"
        for reads in (None, "another"):
            with pytest.raises(StorageError):
                storage.check(reads)


def test_a_role_that_may_list_its_own_prefix_alone_is_let_in(no_keys):
    with serving(ObjectServer()) as server:
        server.listable = "a/"
        assert works("s3://bucket/a", StorageConfig(server.url, anonymous=True))
        refusal = next(refusals("s3://bucket/b", StorageConfig(server.url, anonymous=True)))
        assert "access to bucket 'bucket' denied" in refusal


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/a", "no AWS credentials: set AWS_ACCESS_KEY_ID and"),
        ("gs://bucket/a", "no Google credentials: set GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://bucket/a", "no Azure credentials: set AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_missing_credentials_are_said_with_the_fix(no_keys, url, message):
    for refusal in refusals(url):
        assert message in refusal and url in refusal


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_PROFILE": "typo"}, "profile (typo) could not be found"),
        ({"AWS_ACCESS_KEY_ID": "key"}, "missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_CONFIG_FILE": __file__}, f"Unable to parse config file: {__file__}"),
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/a"},
            "No such file or directory: '/no/token'",
        ),
        ({"AWS_CA_BUNDLE": "/no/ca.pem"}, "CA bundle /no/ca.pem: No such file or directory"),
        ({"AWS_CA_BUNDLE": __file__}, f"CA bundle {__file__}: holds no PEM certificates"),
    ],
)
def test_settings_that_cannot_be_used_are_named(no_keys, monkeypatch, variables, message):
    if "AWS_CA_BUNDLE" in variables:  # read once there are keys
        variables = variables | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for refusal in refusals("s3://bucket/a"):
        assert refusal.startswith("s3://bucket/a") and message in refusal


def test_a_missing_azure_account_is_said(no_keys, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    for refusal in refusals("az://container/a"):
        assert "no storage account: set AZURE_STORAGE_ACCOUNT_NAME" in refusal


def test_credentials_that_cannot_be_read_are_not_repeated(no_keys, monkeypatch):
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY"):
        monkeypatch.setenv(name, "a broken secret")
    for url in ("az://container/a", "gs://bucket/a"):
        for refusal in refusals(url):
            assert "broken" not in refusal and "secret" not in refusal


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("variable", [True, False])
def test_an_authority_of_one_s_own(monkeypatch, tmp_path, variable):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key,
            "-out", certificate, "-days", "2", "-subj", "/CN=test",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ObjectServer()
    # A handshake in `accept` would let one silent client keep out all the others.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    with serving(server):
        endpoint = f"https://127.0.0.1:{server.server_port}"
        assert "check --storage.endpoint" in next(refusals("s3://bucket", StorageConfig(endpoint)))
        if variable:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        config = StorageConfig(endpoint, ca_bundle=None if variable else str(certificate))
        assert works("s3://bucket/a", config)
        filesystem, path = pyarrow_filesystem("s3://bucket/a", config)
        with filesystem.open_input_stream(f"{path}/object") as stream:
            assert stream.read() == b"1"
