"""Large objects in parts, on a real S3 server and behind a proxy that misbehaves: whole, or nothing of them stays."""

import random
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.errors import UnreachableError
from ddpm_dist.storage import multipart
from tests.faulty_proxy import Fault, FaultyProxy
from tools.local.s3_server import S3Server


def test_large_objects_go_in_parts(faulty_proxy: FaultyProxy, bucket_url: str, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(2 * multipart.PART_BYTES + 12_345)
    faulty_proxy.inject(Fault.UNAVAILABLE, method="PUT", path="partNumber=2")
    faulty_proxy.inject(Fault.RESET, method="PUT", path="partNumber=3")
    storage.publish(f"{bucket_url}/large", memoryview(data))
    assert storage.read(f"{bucket_url}/large") == data
    parts = [r for r in faulty_proxy.requests if r.method == "PUT" and "partNumber=1" in r.path]
    assert len(parts) == 1, "a part that arrived is not sent again when another fails"
    assert set(faulty_proxy.faults_met()) == {Fault.UNAVAILABLE, Fault.RESET}
    (tmp_path / "file").write_bytes(data)
    storage.upload(tmp_path / "file", f"{bucket_url}/uploaded")
    assert (
        storage.read_range(f"{bucket_url}/uploaded", multipart.PART_BYTES - 5, 10)
        == data[multipart.PART_BYTES - 5 :][:10]
    )
    assert storage.size(f"{bucket_url}/uploaded") == len(data)


def test_a_completion_whose_answer_is_lost_is_recognised(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    data = random.Random(3).randbytes(multipart.PART_BYTES + 1)
    faulty_proxy.inject(Fault.LOST_ANSWER, method="POST", path="uploadId=")
    storage.publish(f"{bucket_url}/large", data)
    assert storage.size(f"{bucket_url}/large") == len(data)
    assert faulty_proxy.faults_met() == [Fault.LOST_ANSWER]


def test_an_upload_that_fails_leaves_no_parts(faulty_proxy: FaultyProxy, bucket_url: str, s3_server: S3Server) -> None:
    faulty_proxy.inject(Fault.UNAVAILABLE, method="PUT", path="partNumber=2", times=1000)
    with pytest.raises(UnreachableError):
        storage.publish(f"{bucket_url}/large", bytes(multipart.PART_BYTES + 1), patience_s=0.5)
    assert not storage.exists(f"{bucket_url}/large")
    assert _unfinished(s3_server, bucket_url) == []


def _unfinished(server: S3Server, url: str) -> list[str]:
    """Keys of the unfinished uploads below a folder; other tests, which kill processes, leave some elsewhere."""
    uploads = server.client().list_multipart_uploads(Bucket=server.bucket).get("Uploads", [])
    return [upload["Key"] for upload in uploads if upload["Key"].startswith(url.split("/", 3)[3] + "/")]


def test_unfinished_uploads_of_a_folder_are_given_up(bucket_url: str, s3_server: S3Server) -> None:
    client, folder = s3_server.client(), bucket_url.split("/", 3)[3]
    for key in (f"{folder}/run/a", f"{folder}/run/b/c", f"{folder}/runner"):
        begun = client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)
        target = {"Bucket": s3_server.bucket, "Key": key, "UploadId": begun["UploadId"]}
        client.upload_part(**target, PartNumber=1, Body=b"half")
    assert storage.abort_uploads(f"{bucket_url}/run") == 2
    assert _unfinished(s3_server, bucket_url) == [f"{folder}/runner"]
    assert storage.abort_uploads(f"{bucket_url}/run") == 0
    assert storage.abort_uploads("memory://anything") == 0
