"""Stores with habits of their own: what is needed of one, what is done without, and what is said."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import pytest

from ddpm_dist import storage
from ddpm_dist.commands import inspect_store
from ddpm_dist.doctor import store as trial
from ddpm_dist.errors import AccessError, NotFoundError, StorageError
from ddpm_dist.storage import identity, multipart, objects
from tests.picky_store import PickyStore
from tools.local.s3_server import S3Server

Make = Callable[..., PickyStore]


@pytest.fixture
def picky(s3_server: S3Server, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """picky("habit", …) stands before the S3 server and is this process's AWS_ENDPOINT_URL."""
    stores: list[PickyStore] = []

    def make(*habits: str, prefix: str = "") -> PickyStore:
        stores.append(PickyStore(s3_server.endpoint, *habits, prefix=prefix).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", stores[-1].endpoint)
        storage.clear_instances()
        return stores[-1]

    yield make
    for store in stores:
        store.__exit__(None, None, None)


@pytest.mark.parametrize("habit", ["checksum501", "checksum400"])
def test_a_store_that_refuses_checksums_gets_none(
    habit: str, picky: Make, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = picky(habit)
    storage.publish(f"{bucket_url}/a", b"1")
    assert storage.create(f"{bucket_url}/once", b"mine")
    assert not storage.create(f"{bucket_url}/once", b"yours")
    monkeypatch.setattr(multipart, "PART_BYTES", 5 * 2**20)
    data = os.urandom(6 * 2**20)
    storage.publish(f"{bucket_url}/large", data)
    assert storage.read(f"{bucket_url}/large") == data
    puts = [r for r in store.requests if r.method == "PUT" and r.path.endswith("/a")]
    assert len(puts) == 2, "refused once, and never asked again with a checksum"


def test_a_large_object_can_be_the_first(picky: Make, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picky("checksum501")
    monkeypatch.setattr(multipart, "PART_BYTES", 5 * 2**20)
    storage.publish(f"{bucket_url}/large", bytes(6 * 2**20))
    assert storage.size(f"{bucket_url}/large") == 6 * 2**20


def test_who_asks_for_checksums_hears_of_the_variable(
    picky: Make, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(identity.CHECKSUMS, "when_supported")
    picky("checksum501")
    with pytest.raises(AccessError, match=f"set {identity.CHECKSUMS}=when_required"):
        storage.publish(f"{bucket_url}/a", b"1", patience_s=3600)


def test_a_refusal_for_another_reason_leaves_the_checksums_on(picky: Make, bucket_url: str) -> None:
    picky("cond501")
    with pytest.raises(StorageError):
        storage.create(f"{bucket_url}/once", b"1")
    assert objects.filesystem(bucket_url)[0].s3.meta.config.request_checksum_calculation == "when_supported"


def test_a_store_without_conditional_writes_is_refused_at_once(picky: Make, bucket_url: str) -> None:
    picky("cond501")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"lacks If-None-Match.*docs/stores.md"):
        storage.create(f"{bucket_url}/once", b"1")
    assert time.monotonic() - began < 10


def test_a_store_that_ignores_the_condition_is_found_out(picky: Make, bucket_url: str) -> None:
    assert storage.create(f"{bucket_url}/honest", b"first")
    storage.check_create(f"{bucket_url}/honest", b"second")
    picky("condignored")
    assert storage.create(f"{bucket_url}/once", b"first")
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        storage.check_create(f"{bucket_url}/once", b"second")


@pytest.mark.parametrize("habit", ["md5delete", "deletedenied"])
def test_what_is_not_deleted_in_bulk_is_deleted_singly(habit: str, picky: Make, bucket_url: str) -> None:
    for name in ("a", "b/c", "b/d"):
        storage.publish(f"{bucket_url}/tree/{name}", b"1")
    storage.publish(f"{bucket_url}/trees", b"another's")
    picky(habit)
    storage.delete_tree(f"{bucket_url}/tree")
    assert storage.list_objects(bucket_url) == {"trees": 9}


def test_what_may_not_be_deleted_is_said(picky: Make, bucket_url: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        storage.publish(f"{bucket_url}/tree/{name}", b"1")
    picky("nodelete")
    with pytest.raises(AccessError, match="s3:DeleteObject"):
        storage.delete_tree(f"{bucket_url}/tree")
    assert len(storage.list_objects(f"{bucket_url}/tree")) == 2
    with pytest.raises(AccessError, match="s3:DeleteObject"):
        storage.delete(f"{bucket_url}/tree/a")
    storage.delete(f"{bucket_url}/tree/none")
    storage.discard(f"{bucket_url}/tree")
    assert "stays, as the store lets nobody remove it" in caplog.text


@pytest.mark.parametrize(
    ("habit", "said", "code"),
    [
        ("md5delete", "ok      delete", None),
        ("nodelete", "FAILED  delete (else old states stay): ", None),
        ("condignored", "FAILED  create once: ", 1),
        ("cond501", "FAILED  create once: ", 1),
    ],
)
def test_one_command_says_whether_a_store_will_do(
    habit: str,
    said: str,
    code: int | None,
    picky: Make,
    bucket_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "LARGE_BYTES", 2**20)
    picky(habit)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext():
        inspect_store.main([bucket_url])
    out = capsys.readouterr().out
    assert said in out
    assert "with the keys of the environment (AWS_ACCESS_KEY_ID)" in out
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in out
    assert (f"{bucket_url}: usable" in out) == (code is None)


@pytest.mark.parametrize("habits", [(), ("nolist",)])
def test_permission_to_list_a_prefix_is_enough(habits: tuple[str, ...], picky: Make, bucket_url: str) -> None:
    prefix = bucket_url.split("/", 3)[3]
    picky(*habits, prefix=f"{prefix}/")
    storage.check_access(bucket_url, "run.url")
    assert storage.list_names(bucket_url) == []
    assert storage.list_objects(f"{bucket_url}/new/run") == {}
    assert not storage.exists(f"{bucket_url}/missing")
    for action in (storage.read, storage.size, lambda url: storage.read_range(url, 0, 1)):
        with pytest.raises(NotFoundError, match="missing: not found"):
            action(f"{bucket_url}/missing")
    storage.publish(f"{bucket_url}/a/b", b"1")
    assert storage.exists(f"{bucket_url}/a/b")
    assert storage.list_names(bucket_url) == ["a"]
    storage.delete_tree(f"{bucket_url}/a")
    assert storage.list_objects(bucket_url) == {}


def test_without_listing_what_is_there_is_read_and_the_doubt_is_said(picky: Make, bucket_url: str) -> None:
    storage.publish(f"{bucket_url}/a", b"0123")
    picky("listdenied")
    assert storage.read(f"{bucket_url}/a") == b"0123"
    assert storage.read_range(f"{bucket_url}/a", 1, 2) == b"12"
    with pytest.raises(AccessError, match="or there is no such object"):
        storage.read(f"{bucket_url}/missing")
    with pytest.raises(AccessError, match=r"run.url: .*s3:ListBucket"):
        storage.check_access(bucket_url, "run.url")
