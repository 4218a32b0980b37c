"""Mistakes of set-up: each is an AccessError (or StorageError) within seconds, with its own remedy."""

import contextlib
import logging
import os
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.exceptions import NoRegionError

from ddpm_dist import cli, storage
from ddpm_dist.errors import AccessError, StorageError, UnreachableError
from ddpm_dist.storage import identity
from ddpm_dist.storage.errors import classify
from tests.picky_store import xml

PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body><br>&nbsp;</body></html>"
HTML = {"Content-Type": "text/html"}
SECONDS = 10.0
CONFIG = """
[profile login]
sso_session = s
sso_account_id = 123456789012
sso_role_name = r
region = us-east-1
[sso-session s]
sso_region = us-east-1
sso_start_url = https://127.0.0.1:9/start
[profile role]
role_arn = arn:aws:iam::123456789012:role/x
source_profile = nobody
[profile process]
credential_process = /bin/false
[profile half]
aws_access_key_id = abcdefgh
[profile own]
aws_access_key_id = abcdefgh
aws_secret_access_key = ijklmnop
endpoint_url = ENDPOINT
"""


@dataclass(frozen=True)
class Answer:
    """What a server says to everything."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """serve(answer, tls=False): host:port of a server on loopback."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer, tls: bool = False) -> str:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answer))
            if tls:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*_certificate(tmp_path))
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_address[1]}"

        yield start


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with keys in the environment, profiles in a file, and no machine role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(CONFIG)
    values = {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret/example",
        "AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path),
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    storage.clear_instances()
    yield
    storage.clear_instances()


def refusal(kind: type[StorageError] = AccessError) -> str:
    """The message by which a start ends; quickly."""
    storage.clear_instances()
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        storage.check_access("s3://bucket/run", "run.url")
    assert time.monotonic() - began < SECONDS
    assert "secret/example" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("profile", "remedy"),
    [
        ("login", "not logged in .* run `aws sso login --profile login` on this node"),
        ("role", "the AWS configuration can't be used: .*nobody"),
        ("process", "asked with the credential_process of the profile process"),
        ("half", "missing: aws_secret_access_key.*asked with the keys of the profile half"),
        ("nobody", r"the AWS configuration can't be used: .*\(nobody\)"),
    ],
)
def test_profiles(
    profile: str,
    remedy: str,
    serve: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cli.setup_logging()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{serve(Answer(403))}")
    monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with caplog.at_level(logging.INFO):
        message = refusal()
    assert re.search(remedy, message)
    assert "Traceback" not in caplog.text


REGION = "<Region>eu-west-1</Region>"


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (Answer(200, PAGE, HTML), "a web page .* AWS_ENDPOINT_URL is"),
        (Answer(403, PAGE, HTML), "a web page .* AWS_ENDPOINT_URL is"),
        (Answer(302, b"", {"Location": "/login"}), "sends elsewhere, as a login page does"),
        (
            Answer(301, xml("PermanentRedirect", "elsewhere"), {"x-amz-bucket-region": "eu-west-1"}),
            "set AWS_DEFAULT_REGION to the bucket's, eu-west-1",
        ),
        (
            Answer(400, xml("AuthorizationHeaderMalformed", "wrong", REGION)),
            "AWS_DEFAULT_REGION to the bucket's, eu-west-1",
        ),
        (Answer(400, xml("ExpiredToken", "expired")), "have expired; renew .*AWS_SESSION_TOKEN on this node"),
        (Answer(403, xml("AccessDenied", "no")), "asked with the keys of the environment"),
        (Answer(501, xml("NotImplemented", "no")), "the store answered 501 NotImplemented"),
        (Answer(403, xml("RequestTimeTooSkewed", "no")), "this node's clock"),
    ],
)
def test_answers(answer: Answer, remedy: str, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token/example")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{serve(answer)}")
    assert re.search(remedy, refusal(StorageError))


def test_tls(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_tls, without = serve(Answer(200), tls=True), serve(Answer(200))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{with_tls}")
    assert "certificate isn't trusted (self-signed certificate); set AWS_CA_BUNDLE" in refusal()
    monkeypatch.setenv("AWS_CA_BUNDLE", "/none/ca.pem")
    assert "AWS_CA_BUNDLE: /none/ca.pem: can't be used" in refusal()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "config"))
    assert "can't be used" in refusal()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{without}")
    assert f"https://{without} doesn't speak TLS; write http://" in refusal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{with_tls}")
    assert f"it speaks TLS: write https://{with_tls}" in refusal(UnreachableError)


def test_the_profiles_endpoint_is_the_endpoint(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint = f"http://{serve(Answer(403, xml('AccessDenied', 'no')))}"
    (tmp_path / "config").write_text(CONFIG.replace("ENDPOINT", endpoint))
    monkeypatch.setenv("AWS_PROFILE", "own")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "asked with the keys of the profile own" in refusal()
    assert identity.endpoint() == endpoint
    assert not identity.is_aws()


@pytest.mark.parametrize("value", ["never"])
def test_a_wrong_setting_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(identity.CHECKSUMS, value)
    assert "request_checksum_calculation" in refusal()


@pytest.mark.parametrize("url", ["s3a://bucket/run", "s3n://bucket/run"])
def test_hadoops_names_are_refused(url: str) -> None:
    with pytest.raises(StorageError, match="write s3://BUCKET/FOLDER"):
        storage.check_access(url)


def test_no_region_names_the_variable() -> None:
    error = classify(NoRegionError(), "s3://bucket/a")
    assert isinstance(error, AccessError)
    assert "no region; set AWS_DEFAULT_REGION, or region in the profile" in str(error)


class StrangeError(Exception):
    """Of a library that nobody here knows."""


@pytest.mark.parametrize("error", [StrangeError("what?"), RuntimeError("no loop"), KeyError("x"), OSError("odd")])
def test_what_nobody_knows_is_not_waited_for(error: Exception) -> None:
    assert not isinstance(classify(error, "s3://bucket/a"), UnreachableError)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), TimeoutError(), OSError(116, "stale file handle")]
)
def test_a_connection_that_failed_is(error: Exception) -> None:
    assert isinstance(classify(error, "s3://bucket/a"), UnreachableError)


def _handler(answer: Answer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # http.server's names

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    return Handler


def _certificate(folder: Path) -> tuple[str, str]:
    """Files of a self-signed certificate for 127.0.0.1 and of its key."""
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
