"""Faults of the store and of the clock, before a real server."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.doctor import Row, State, store
from ddpm_dist.doctor.rows import Asked
from ddpm_dist.recipe import dump_config, load_config
from tests.doctor import faults
from tests.doctor.faults import by_name, failing
from tests.picky_store import PickyStore
from tools.local.s3_server import S3Server

ROOT = faults.ROOT
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture(scope="module")
def digits(s3_server: S3Server) -> str:
    url = f"s3://{s3_server.bucket}/doctor-digits"
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), "digits", url]
    subprocess.run(command, env={**os.environ, **s3_server.env}, check=True, capture_output=True)
    return url


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE_BYTES", 2**20)
    monkeypatch.setattr(store, "PATIENCE_S", 2.0)


def rows(run_url: str, data_url: str, *overrides: str) -> list[Row]:
    storage.clear_instances()
    cfg = load_config("digits", [f"run.url={run_url}", f"data.url={data_url}", *overrides])
    return store.rows_of_store(Asked(dump_config(cfg)), "here")


def left(server: S3Server, url: str) -> list[str]:
    """Objects and unfinished uploads below a URL, by a client of its own."""
    client, prefix = server.client(), url.split("/", 3)[3]
    objects = client.list_objects_v2(Bucket=server.bucket, Prefix=prefix).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=server.bucket).get("Uploads") or []
    return [one["Key"] for one in [*objects, *uploads] if one["Key"].startswith(prefix)]


def test_a_good_store_has_no_failing_row_and_nothing_is_left(s3_server: S3Server, bucket_url: str, digits: str) -> None:
    found = rows(bucket_url, digits)
    assert not failing(found)
    remarks = {row.check for row in found if row.state is State.REMARK}
    assert remarks <= {"store: a large object in parts"}, "which a busy machine makes slow"
    assert by_name(found)["store: reach"].found.endswith("with the keys of the environment (AWS_ACCESS_KEY_ID)")
    assert "read at" in by_name(found)["store: a large object in parts"].found
    assert not left(s3_server, bucket_url)


def test_ctrl_c_leaves_nothing(s3_server: S3Server, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.storage, "list_objects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows(bucket_url, bucket_url + "-data")
    monkeypatch.undo()
    assert not left(s3_server, bucket_url)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong" * 8, "access refused"),
        ("AWS_ACCESS_KEY_ID", "nobody", "access refused"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "AWS_ENDPOINT_URL is http://127.0.0.1:9"),
    ],
)
def test_wrong_keys_and_endpoints_fail_to_reach(
    variable: str, value: str, said: str, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = rows(bucket_url, bucket_url + "-data")
    assert set(failing(found)) == {"store: reach"}
    assert said in failing(found)["store: reach"]
    assert all("wrongwrong" not in row.found for row in found)


def test_a_bucket_that_is_not_there(bucket_url: str) -> None:
    assert "there is no bucket none-such" in failing(rows("s3://none-such/run", bucket_url))["store: reach"]


@pytest.fixture
def picky(s3_server: S3Server, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    stores = []

    def make(habit: str) -> None:
        stores.append(PickyStore(s3_server.endpoint, habit).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", stores[-1].endpoint)

    yield make
    for one in stores:
        one.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("habit", "check", "said"),
    [
        ("cond501", "store: create once", "lacks If-None-Match"),
        ("condignored", "store: create once", "ignores If-None-Match"),
    ],
)
def test_a_store_without_conditional_create(
    habit: str, check: str, said: str, picky: Callable[[str], None], bucket_url: str, digits: str
) -> None:
    picky(habit)
    found = failing(rows(bucket_url, digits))
    assert set(found) == {check}
    assert said in found[check]


def test_what_may_not_be_listed_or_deleted(picky: Callable[[str], None], bucket_url: str, digits: str) -> None:
    picky("listdenied")
    assert set(failing(rows(bucket_url, digits))) == {"store: reach"}
    picky("nodelete")
    found = rows(bucket_url, digits)
    assert not failing(found), "a run works; old states stay"
    assert by_name(found)["store: delete (else old states stay)"].state is State.REMARK


def test_data_that_are_not_there(bucket_url: str) -> None:
    found = failing(rows(bucket_url, bucket_url + "-none"))
    assert set(found) == {"data"}
    assert "index.json: not found" in found["data"]


def test_a_clock_beside_the_stores(bucket_url: str, digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose Date is 10 minutes ahead; elsewhere the clock itself is moved."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        storage.clear_instances()
        from threading import Thread

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                date = formatdate(time.time() + 600, usegmt=True)
                connection.sendall(f"HTTP/1.1 403 Forbidden\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())

        thread = Thread(target=answer)
        thread.start()
        cfg = load_config("digits", [f"run.url={bucket_url}", f"data.url={digits}"])
        row = store.clock.row(Asked(dump_config(cfg)))
        thread.join()
    assert row.state is State.FAILED
    assert row.found in ("599 s behind the store's", "600 s behind the store's", "601 s behind the store's")
    assert storage.clock_ahead_s("file:///tmp") is None


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime")
def test_a_clock_that_is_off_by_ten_minutes(s3_server: S3Server, bucket_url: str, digits: str) -> None:
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-10m", "DONT_FAKE_MONOTONIC": "1"}
    code, found, _ = faults.run(["--config", "digits", f"run.url={bucket_url}", f"data.url={digits}"], environment)
    assert (code, set(failing(found))) == (1, {"clock"})
    assert failing(found)["clock"].endswith("behind the store's")
    assert not left(s3_server, bucket_url)


def test_a_folder_on_a_disk_is_gone_with_those_that_were_made_for_it(tmp_path: Path) -> None:
    found = rows((tmp_path / "not" / "there").as_uri(), (tmp_path / "data").as_uri())
    assert set(failing(found)) == {"data"}
    assert not list(tmp_path.iterdir())
    if os.geteuid() and shutil.which("chmod"):
        tmp_path.chmod(0o500)
        assert "store: reach" in failing(rows((tmp_path / "run").as_uri(), "file:///none"))
