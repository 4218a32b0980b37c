"""ddpm_dist.storage against a real S3 server, a proxy that misbehaves, local files and memory."""

import logging
import multiprocessing
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.errors import AccessError, NotFoundError, ShortReadError, StorageError, UnreachableError
from ddpm_dist.storage import filesystem, objects
from tests.faulty_proxy import Fault, FaultyProxy
from tools.local.s3_server import S3Server


@pytest.fixture(params=["s3", "file", "memory"])
def folder_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("bucket_url")
    elif request.param == "file":
        yield f"file://{tmp_path}/folder"
    else:
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        storage.delete_tree(url)


# Every kind of store


def test_what_is_published_is_read_back(folder_url: str) -> None:
    data = random.Random(0).randbytes(100_000)
    url = storage.join(folder_url, "a", "b.bin")
    storage.publish(url, data)
    assert storage.read(url) == data
    assert storage.size(url) == len(data)
    assert storage.read_range(url, 0, 10) == data[:10]
    assert storage.read_range(url, 99_990, 10) == data[-10:]
    assert storage.read_range(url, 5, 0) == b""
    storage.publish(url, memoryview(b"replaced"))
    assert storage.read(url) == b"replaced"


def test_a_range_that_the_object_does_not_hold_is_an_error_at_once(folder_url: str) -> None:
    url = storage.join(folder_url, "a")
    storage.publish(url, b"0123456789")
    for start, length in [(8, 3), (10, 1), (500, 4)]:
        with pytest.raises(ShortReadError, match=rf"holds 10 bytes, where {length} from byte {start} were expected"):
            storage.read_range(url, start, length, patience_s=3600)


def test_what_is_missing_is_named(folder_url: str) -> None:
    url = storage.join(folder_url, "missing")
    for action in (storage.read, storage.size, lambda u: storage.read_range(u, 0, 4)):
        with pytest.raises(NotFoundError, match="missing: not found"):
            action(url)
    assert not storage.exists(url)
    assert storage.list_objects(folder_url) == {}
    assert storage.list_names(folder_url) == []
    storage.delete(url)
    storage.delete_tree(folder_url)


def test_listings(folder_url: str) -> None:
    for name, data in {"a": b"1", "b/c": b"22", "b/d/e": b"333", "bb": b""}.items():
        storage.publish(storage.join(folder_url, name), data)
    assert storage.list_objects(folder_url) == {"a": 1, "b/c": 2, "b/d/e": 3, "bb": 0}
    assert storage.list_objects(storage.join(folder_url, "b")) == {"c": 2, "d/e": 3}
    assert storage.list_names(folder_url) == ["a", "b", "bb"]
    assert storage.list_names(storage.join(folder_url, "a")) == []
    assert storage.exists(storage.join(folder_url, "a"))
    assert not storage.exists(storage.join(folder_url, "b")), "a folder is no object"
    with pytest.raises(StorageError):
        storage.size(storage.join(folder_url, "b"))
    storage.delete(storage.join(folder_url, "a"))
    storage.delete_tree(storage.join(folder_url, "b"))
    assert storage.list_objects(folder_url) == {"bb": 0}


def test_create_once(folder_url: str) -> None:
    url = storage.join(folder_url, "owner", "1")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"


def test_an_uploaded_file_is_the_file(folder_url: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(random.Random(1).randbytes(70_000))
    storage.upload(local, storage.join(folder_url, "up"))
    assert storage.read(storage.join(folder_url, "up")) == local.read_bytes()


@pytest.mark.parametrize("url", ["out/run", "file://out/run", "/tmp/run"])
def test_a_path_that_depends_on_where_one_stands_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="not an absolute URL; write file:///"):
        storage.read(url)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageError, match="nosuch"):
        storage.read("nosuch://a/b")


# S3 itself


def test_more_than_a_page_of_names(bucket_url: str) -> None:
    names = [f"{i:05d}" for i in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.publish(f"{bucket_url}/many/{name}", b"."), names))
    assert list(storage.list_objects(f"{bucket_url}/many")) == names
    assert storage.list_names(f"{bucket_url}/many") == names
    storage.delete_tree(f"{bucket_url}/many")
    assert storage.list_names(f"{bucket_url}/many") == []


def _race(url: str, number: int, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put((storage.create(url, f"attempt {number}".encode()), number))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_of_many_processes_that_create_one_succeeds(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue("bucket_url") if kind == "s3" else f"file://{tmp_path}"
    context = multiprocessing.get_context("fork")
    for round_ in range(2):
        url = f"{folder}/claim/{round_}"
        start, results = context.Event(), context.Queue()
        racers = [context.Process(target=_race, args=(url, number, start, results)) for number in range(4)]
        for racer in racers:
            racer.start()
        start.set()
        answers = [results.get(timeout=60) for _ in racers]
        for racer in racers:
            racer.join(60)
        winners = [number for won, number in answers if won]
        assert len(winners) == 1
        assert storage.read(url) == f"attempt {winners[0]}".encode()


def _child_reads(url: str, results: object) -> None:
    results.put(storage.read(url))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_a_process_that_has_connections_have_their_own(bucket_url: str, method: str) -> None:
    storage.publish(f"{bucket_url}/a", b"before the fork")
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=_child_reads, args=(f"{bucket_url}/a", results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [b"before the fork"] * 2
    for child in children:
        child.join(60)
    # Without patience: a child that closed what it shares would show as a time-out.
    assert storage.read(f"{bucket_url}/a", patience_s=0) == b"before the fork"


def test_threads_share_connections(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    storage.publish(f"{bucket_url}/a", bytes(1000))
    filesystems = []

    def work() -> None:
        filesystems.append(objects.filesystem(bucket_url)[0])
        for _ in range(20):
            assert storage.read(f"{bucket_url}/a") == bytes(1000)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(map(id, filesystems))) == 1
    assert faulty_proxy.connections <= 8, "80 reads and a write, and no connection for each"


# A way to the store that breaks


FAULTS = [Fault.CUT, Fault.UNAVAILABLE, Fault.INTERNAL, Fault.RESET, Fault.LOST_ANSWER]


@pytest.mark.parametrize("fault", [*FAULTS, Fault.SHORT])
def test_reads_survive(fault: Fault, faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    data = random.Random(4).randbytes(50_000)
    storage.publish(f"{bucket_url}/a", data)
    for action, expected in [
        (lambda: storage.read_range(f"{bucket_url}/a", 100, 40_000), data[100:40_100]),
        (lambda: storage.read(f"{bucket_url}/a"), data),
    ]:
        faulty_proxy.inject(fault, times=2)
        assert action() == expected
    assert set(faulty_proxy.faults_met()) == {fault}


def test_a_damaged_answer_is_noticed_where_the_store_sent_a_checksum(
    faulty_proxy: FaultyProxy, bucket_url: str
) -> None:
    storage.publish(f"{bucket_url}/a", b"0123456789" * 1000)
    faulty_proxy.inject(Fault.WRONG_BYTES)
    assert storage.read(f"{bucket_url}/a") == b"0123456789" * 1000
    assert faulty_proxy.faults_met() == [Fault.WRONG_BYTES]


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.INTERNAL, Fault.RESET, Fault.LOST_ANSWER])
def test_writes_survive(fault: Fault, faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    faulty_proxy.inject(fault, method="PUT", times=2)
    storage.publish(f"{bucket_url}/a", b"data")
    assert storage.read(f"{bucket_url}/a") == b"data"
    faulty_proxy.inject(fault, method="PUT")
    assert storage.create(f"{bucket_url}/once", b"mine"), "a lost answer doesn't make our own object a stranger's"
    assert not storage.create(f"{bucket_url}/once", b"yours")
    assert fault in faulty_proxy.faults_met()


def test_a_stalled_answer_is_given_up_and_asked_for_again(
    faulty_proxy: FaultyProxy, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "READ_TIMEOUT_S", 1)
    storage.clear_instances()
    storage.publish(f"{bucket_url}/a", bytes(10_000))
    faulty_proxy.inject(Fault.STALL)
    assert storage.read_range(f"{bucket_url}/a", 0, 10_000) == bytes(10_000)
    assert faulty_proxy.faults_met() == [Fault.STALL]


def test_patience_ends(faulty_proxy: FaultyProxy, bucket_url: str, caplog: pytest.LogCaptureFixture) -> None:
    faulty_proxy.inject(Fault.UNAVAILABLE, times=1000)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UnreachableError, match=r"503 SlowDown.*given up after \d attempts in \d s"),
    ):
        storage.read(f"{bucket_url}/a", patience_s=4.0)
    assert "attempt 2 in" in caplog.text


def test_reading_goes_on_when_a_killed_server_is_back(bucket_url: str, s3_server: S3Server) -> None:
    data = random.Random(5).randbytes(200_000)
    storage.publish(f"{bucket_url}/a", data)
    s3_server.kill()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(storage.read_range, f"{bucket_url}/a", start, 1000) for start in range(0, 8000, 1000)]
        write = pool.submit(storage.publish, f"{bucket_url}/b", b"written during the outage")
        time.sleep(1.0)
        s3_server.restart()
        assert b"".join(read.result() for read in reads) == data[:8000]
        write.result()
    assert storage.read(f"{bucket_url}/b") == b"written during the outage"


# What a user can do wrong


def test_a_missing_bucket_is_named(bucket_url: str) -> None:
    for action in (
        storage.check_access,
        storage.list_objects,
        storage.list_names,
        lambda url: storage.read(storage.join(url, "a")),
        lambda url: storage.publish(storage.join(url, "a"), b"1"),
    ):
        with pytest.raises(NotFoundError, match="there is no bucket typo-in-name"):
            action("s3://typo-in-name/folder")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_at_once_and_not_shown(
    name: str, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "WRONGWRONGWRONGWRONG")
    storage.clear_instances()
    for action in (storage.check_access, lambda url: storage.read(url, patience_s=3600)):
        with pytest.raises(AccessError, match="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
            action(f"{bucket_url}/a")
        for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ[secret] not in str(caught.value)


def test_missing_credentials_are_named(bucket_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    storage.clear_instances()
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY not set on this node"):
        storage.check_access(bucket_url)


def test_an_unreachable_endpoint_is_named(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.clear_instances()
    with pytest.raises(UnreachableError, match="AWS_ENDPOINT_URL is http://"):
        storage.check_access(bucket_url, patience_s=0.5)


def test_an_endpoint_with_a_password_is_an_error_at_once(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@nowhere.invalid")
    storage.clear_instances()
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL: holds user:password@") as caught:
        storage.check_access(bucket_url, patience_s=60)
    assert "hunter2" not in str(caught.value)


def test_an_endpoint_that_accepts_and_never_answers_is_given_up(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    faulty_proxy.inject(Fault.STALL, times=1000)
    with pytest.raises(UnreachableError):
        storage.check_access(bucket_url, patience_s=1.0)


def test_an_endpoint_without_a_scheme_is_an_error_at_once(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    storage.clear_instances()
    with pytest.raises(StorageError, match=r"127.0.0.1:9000"):
        storage.read(f"{bucket_url}/a", patience_s=3600)


def test_an_aws_profile_that_is_not_there_is_an_error_at_once(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    storage.clear_instances()
    with pytest.raises(
        StorageError, match=rf"{bucket_url}/a: the AWS configuration .*: The config profile \(nobody\) could"
    ):
        storage.read(f"{bucket_url}/a")


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-value")
    text = "at http://me:pw@host/x?X-Amz-Signature=abc with s3cr3t-value"
    assert storage.redact(text) == "at http://host/x with $AWS_SECRET_ACCESS_KEY"


# Local files


def test_a_local_publish_is_never_seen_half_done(tmp_path: Path) -> None:
    url, sizes, stop = f"file://{tmp_path}/a", set(), threading.Event()
    storage.publish(url, bytes(1))

    def look() -> None:
        while not stop.is_set():
            sizes.add(len(storage.read(url)))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        storage.publish(url, bytes(1_000_000))
        storage.publish(url, bytes(1))
    stop.set()
    reader.join()
    assert sizes <= {1, 1_000_000}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path) -> None:
    storage.publish(f"file://{tmp_path}/a", b"1")
    (tmp_path / "b.1234.0a1b2c3d.tmp").write_bytes(b"half")
    assert storage.list_objects(f"file://{tmp_path}") == {"a": 1}
    assert storage.list_names(f"file://{tmp_path}") == ["a"]


def test_a_full_disk_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    monkeypatch.setattr("ddpm_dist.storage.local._write_temporary", lambda path, write: _write_to_full_disk(write))
    with pytest.raises(StorageError, match="No space left on device"):
        storage.publish(f"file://{tmp_path}/a", bytes(100_000), patience_s=3600)


def _write_to_full_disk(write: object) -> str:
    with open("/dev/full", "wb") as file:
        write(file)  # type: ignore[operator]
    return "/dev/full"


def test_a_local_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/a"):
        storage.publish(f"file://{tmp_path}/file/a", b"1", patience_s=3600)
