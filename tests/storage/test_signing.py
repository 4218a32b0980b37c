"""Signed URLs beside those of botocore's client, at a fixed time and by a real server."""

import datetime
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import botocore.auth
import botocore.session
import pytest
from botocore.config import Config

from ddpm_dist import storage
from ddpm_dist.storage import signing

SIGNED_AT = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
PATHS = ("bucket/a.tar", "bucket/a b/ü+%/~x.tar", "bucket.with.dots/deep/er/1=2&3")


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Credentials in the environment, and no AWS configuration of this machine's user."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret/example")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: SIGNED_AT)
    signing.forget()
    yield
    signing.forget()


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("token", [None, "session/token="])
@pytest.mark.parametrize("region", [None, "eu-central-1"])
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:8333", "https://minio.example.org"])
@pytest.mark.parametrize("path", PATHS)
def test_the_client_would_sign_the_same(
    path: str, endpoint: str, region: str | None, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("AWS_DEFAULT_REGION", region), ("AWS_SESSION_TOKEN", token)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, region_name=region or "us-east-1", config=Config(signature_version="s3v4")
    )
    bucket, _, key = path.partition("/")
    theirs = client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, ExpiresIn=900)
    ours = signing.sign(endpoint, path, 900)
    assert ours is not None
    assert urlsplit(ours)[:3] == urlsplit(theirs)[:3]
    assert dict(parse_qsl(urlsplit(ours).query)) == dict(parse_qsl(urlsplit(theirs).query))


@pytest.mark.usefixtures("identity")
def test_a_configuration_about_s3_is_the_clients_business(tmp_path: Path) -> None:
    assert signing.sign("http://127.0.0.1:8333", "bucket/key", 900) is not None
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    signing.forget()
    assert signing.sign("http://127.0.0.1:8333", "bucket/key", 900) is None


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("wrong", [("AWS_PROFILE", "nobody"), ("AWS_ACCESS_KEY_ID", None)])
def test_without_an_identity_there_is_no_signature(
    wrong: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = wrong
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if value:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.delenv(name)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    signing.forget()
    assert signing.sign("http://127.0.0.1:8333", "bucket/key", 900) is None


def test_a_server_takes_it(bucket_url: str) -> None:
    url = storage.join(bucket_url, "a b", "ü+%.bin")
    storage.publish(url, b"0123456789")
    signed = storage.signed_url(url, 60)
    assert signed is not None
    with urllib.request.urlopen(signed) as answer:
        assert answer.read() == b"0123456789"
