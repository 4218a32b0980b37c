"""S3's multipart uploads: large objects in parts that are sent side by side and retried one by one."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ddpm_dist.errors import NotFoundError
from ddpm_dist.storage import s3
from ddpm_dist.storage.errors import classify, retry

log = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
"""Larger objects are written in parts of this size."""
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4


def publish(fs: Any, path: str, length: int, part: Callable[[int, int], bytes], url: str, patience_s: float) -> None:
    """Writes an object of `length` bytes, where part(start, end) gives some of them.

    On failure the upload is given up; a completion whose answer was lost is recognised by the object's tag.
    """
    bucket, _, key = path.partition("/")
    step = max(PART_BYTES, -(-length // MAX_PARTS))

    def call(method: str, **arguments: Any) -> dict[str, Any]:
        action = partial(fs.call_s3, method, **arguments)
        return retry(lambda: s3.write(fs, action), url, patience_s)

    upload_id = call("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    target = {"Bucket": bucket, "Key": key, "UploadId": upload_id}

    def send(start: int) -> dict[str, Any]:
        body, number = part(start, min(start + step, length)), start // step + 1
        sent = call("upload_part", **target, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
            parts = list(pool.map(send, range(0, length, step)))
        finish = {**target, "MultipartUpload": {"Parts": parts}}
        try:
            call("complete_multipart_upload", **finish)
        except NotFoundError:
            # A completion whose answer was lost has used the upload up: then the object is there, with its tag.
            if retry(lambda: fs.info(path), url, patience_s)["ETag"].strip('"') != _tag_of(parts):
                raise
    except BaseException:
        try:
            fs.call_s3("abort_multipart_upload", **target)
        except Exception as error:  # the first error matters; `abort` finds the parts later
            log.warning("storage: an upload's parts remain: %s", classify(error, url))
        raise


def abort(fs: Any, path: str, url: str, patience_s: float) -> int:
    """Gives up the unfinished uploads below a folder, and returns how many there were."""
    bucket, _, prefix = path.rstrip("/").partition("/")
    place: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/"}
    uploads: list[dict[str, Any]] = []
    while True:
        page = retry(partial(fs.call_s3, "list_multipart_uploads", **place), url, patience_s)
        uploads += page.get("Uploads", [])
        if not page.get("IsTruncated"):
            break
        place |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    for upload in uploads:
        target = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        try:
            retry(partial(fs.call_s3, "abort_multipart_upload", **target), url, patience_s)
        except NotFoundError:  # it ended by itself
            pass
    return len(uploads)


def _tag_of(parts: list[dict[str, Any]]) -> str:
    """S3's ETag of an object that was uploaded in parts."""
    digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
