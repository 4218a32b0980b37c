"""Plain HTTP ranges of S3 objects: the same bytes as storage's, and storage's errors where they can't be had."""

import threading
import time
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.data import ranges
from ddpm_dist.data.ranges import RangeReader
from ddpm_dist.errors import NotFoundError, ShortReadError
from ddpm_dist.storage import filesystem, objects
from tests.faulty_proxy import Fault, FaultyProxy

DATA = bytes(range(256)) * 4000


def test_ranges_and_the_objects_size(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    url = f"{bucket_url}/folder with spaces/näme+%.tar"
    storage.publish(url, DATA)
    reader = RangeReader()
    for start, length in ((0, 1), (700, 5000), (len(DATA) - 3, 3), (0, len(DATA))):
        assert reader.read(url, start, length) == (DATA[start : start + length], len(DATA))
    assert all("Signature" in request.path for request in faulty_proxy.requests if request.method == "GET")


@pytest.mark.parametrize("size", [0, 1, len(DATA)])
def test_whole_objects(faulty_proxy: FaultyProxy, bucket_url: str, size: int) -> None:
    url = f"{bucket_url}/whole"
    storage.publish(url, DATA[:size])
    assert RangeReader().read_whole(url) == DATA[:size]
    assert all("Signature" in request.path for request in faulty_proxy.requests if request.method == "GET")


def test_a_whole_object_that_was_uploaded_in_parts(bucket_url: str, tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(DATA * 60)  # 61 MB
    storage.upload(file, f"{bucket_url}/big")
    fs, path = objects.filesystem(f"{bucket_url}/big")
    assert "-" in fs.info(path)["ETag"]  # no MD5 of the object
    assert RangeReader().read_whole(f"{bucket_url}/big") == DATA * 60


def test_threads_keep_a_connection_each(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    url = f"{bucket_url}/a.tar"
    storage.publish(url, DATA)
    reader, before = RangeReader(), faulty_proxy.connections
    found: list[bool] = []

    def read() -> None:
        for start in range(0, 50_000, 1000):
            found.append(reader.read(url, start, 1000)[0] == DATA[start : start + 1000])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 150
    assert faulty_proxy.connections - before == 3


def test_errors_are_storages(bucket_url: str) -> None:
    storage.publish(f"{bucket_url}/a.tar", DATA[:100])
    reader = RangeReader()
    for read in (lambda url: reader.read(url, 0, 10), reader.read_whole):
        with pytest.raises(NotFoundError):
            read(f"{bucket_url}/none.tar")
    for start in (95, 200):
        with pytest.raises(ShortReadError, match="it holds 100 bytes"):
            reader.read(f"{bucket_url}/a.tar", start, 10)


@pytest.mark.parametrize("fault", list(Fault))
def test_one_fault_is_not_seen_by_the_reader(
    faulty_proxy: FaultyProxy, bucket_url: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "READ_TIMEOUT_S", 1)
    storage.clear_instances()
    url = f"{bucket_url}/a.tar"
    storage.publish(url, DATA)
    reader = RangeReader()
    faulty_proxy.inject(fault, path="a.tar")
    found, _ = reader.read(url, 10, 3000)
    if fault is Fault.WRONG_BYTES:  # whoever reads checks sums; here is nothing to check against
        assert len(found) == 3000
    else:
        assert found == DATA[10:3010]
    assert faulty_proxy.faults_met() == [fault]
    assert reader.read(url, 10, 3000)[0] == DATA[10:3010]


@pytest.mark.parametrize("fault", list(Fault))
def test_one_fault_in_a_whole_object_is_not_seen(
    faulty_proxy: FaultyProxy, bucket_url: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "READ_TIMEOUT_S", 1)
    storage.clear_instances()
    storage.publish(f"{bucket_url}/whole", DATA)
    faulty_proxy.inject(fault, path="whole")
    assert RangeReader().read_whole(f"{bucket_url}/whole") == DATA  # wrong bytes, too: they don't fit the tag
    assert faulty_proxy.faults_met() == [fault]


def test_signatures_are_renewed(faulty_proxy: FaultyProxy, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SIGNED_FOR_S", 2)
    monkeypatch.setattr(ranges, "RENEWED_AFTER_S", 1)
    url = f"{bucket_url}/a.tar"
    storage.publish(url, DATA)
    reader = RangeReader()
    reader.read(url, 0, 10)
    time.sleep(2.5)
    faulty_proxy.requests.clear()
    assert reader.read(url, 0, 10)[0] == DATA[:10]
    assert len(faulty_proxy.requests) == 1  # an expired one would be refused first


def test_a_proxy_in_the_environment_is_left_to_storage(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket_url}/a.tar"
    storage.publish(url, DATA)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    reader = RangeReader()
    assert reader._signature(url) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert reader._signature(url) is not None


def test_other_stores_are_read_by_storage(tmp_path: object) -> None:
    storage.publish(f"file://{tmp_path}/a", DATA)
    assert RangeReader().read(f"file://{tmp_path}/a", 5, 7) == (DATA[5:12], None)
