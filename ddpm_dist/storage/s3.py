"""What S3 has beyond a filesystem: listings by prefix, deletion in bulk and singly, the reason behind a refusal.

Through s3fs's connections, but not its notions of folders: those list the parents of what they are asked for, which a
policy need not allow, and pass over the keys that a bulk deletion was refused for.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ddpm_dist.errors import AccessError, NotFoundError, StorageError
from ddpm_dist.storage import identity
from ddpm_dist.storage.errors import answer_of, classify, is_web_page, redact, retry
from ddpm_dist.storage.remedies import wrong_scheme

T = TypeVar("T")
log = logging.getLogger(__name__)

WITHOUT_REASON = (301, 307, 400, 403)
"""Answers to a HEAD that would have said more to a GET; and 403 can mean that there is no such object."""
WITHOUT_CHECKSUM = (400, 403, 501)
"""Answers that a checksum can be the reason of: unknown arguments, a signature that seems wrong, not implemented."""
DELETED_AT_ONCE = 1000
DELETIONS_AT_ONCE = 16


def write(fs: Any, action: Callable[[], T]) -> T:
    """`action()`, a write; where a store other than Amazon's refuses it, once more without its optional checksum.

    A store that keeps checksums has damage in transit noticed; but some know none (R2 at first, Backblaze, Google's,
    old MinIO and Ceph), and each says so in its own way. What works is kept for all later writes of this process.
    """
    config = fs.s3.meta.config
    before = config.request_checksum_calculation
    try:
        return action()
    except Exception as error:
        code, status = answer_of(error)
        if before == "when_required" or status not in WITHOUT_CHECKSUM:
            raise
        if identity.is_aws() or identity.checksums_are_chosen():
            raise
        config.request_checksum_calculation = "when_required"
        try:
            result = action()
        except Exception:
            config.request_checksum_calculation = before
            raise error  # noqa: B904 - the first answer is the store's reason; its own cause stays with it
        log.info("this store takes no checksums with what is written (%s %s): it is written without", status, code)
        return result


def sizes(fs: Any, path: str) -> dict[str, int]:
    """{key below the folder: bytes} of all objects in it; one attempt."""
    _, prefix = _split(path)
    found = (entry for page in _pages(fs, path) for entry in page.get("Contents", []))
    return {e["Key"].removeprefix(prefix): int(e["Size"]) for e in found if not e["Key"].endswith("/")}


def names(fs: Any, path: str) -> set[str]:
    """Names of what lies directly in a folder, objects and folders; one attempt."""
    _, prefix = _split(path)
    found: set[str] = set()
    for page in _pages(fs, path, Delimiter="/"):
        found |= {entry["Key"] for entry in page.get("Contents", [])}
        found |= {entry["Prefix"] for entry in page.get("CommonPrefixes", [])}
    return {name.removeprefix(prefix).rstrip("/") for name in found} - {""}


def delete_all(fs: Any, path: str, url: str, patience_s: float) -> None:
    """Removes all objects in a folder; AccessError if the store keeps some of them."""
    bucket, _ = _split(path)
    pages = retry(lambda: list(_pages(fs, path)), url, patience_s)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    for start in range(0, len(keys), DELETED_AT_ONCE):
        some = keys[start : start + DELETED_AT_ONCE]
        left = _delete_in_bulk(fs, bucket, some, url, patience_s)
        if left:
            _delete_singly(fs, bucket, left, url, patience_s)


def missing_or_refused(fs: Any, path: str, url: str, refused: StorageError) -> StorageError:
    """What a 403 (or a HEAD's answer without a reason) means: that there is no such object, or that one may not.

    Without s3:ListBucket for the key itself, as under a policy for a prefix, a store says 403 for both.
    """
    bucket, _, key = path.partition("/")
    try:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    except Exception as error:  # the listing's own refusal has a reason, where a HEAD's had none
        if refused.status == 403 and answer_of(error)[1] == 403:
            return type(refused)(f"{refused} (or there is no such object: without s3:ListBucket a store doesn't say)")
        return classify(error, url)
    if any(entry["Key"] == key for entry in page.get("Contents", [])):
        return refused
    return NotFoundError(f"{redact(url)}: not found")


def _split(path: str) -> tuple[str, str]:
    """(bucket, prefix that ends with a slash, or is empty)."""
    bucket, _, key = path.strip("/").partition("/")
    return bucket, f"{key}/" if key else ""


def _pages(fs: Any, path: str, **options: str) -> Iterator[dict[str, Any]]:
    bucket, prefix = _split(path)
    query = {"Bucket": bucket, "Prefix": prefix, **options}
    while True:
        page = fs.call_s3("list_objects_v2", **query)
        yield page
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def _delete_in_bulk(fs: Any, bucket: str, keys: Sequence[str], url: str, patience_s: float) -> list[str]:
    """One DeleteObjects; the keys that are left by it, all where the store doesn't know how."""
    if len(keys) == 1:
        return list(keys)
    order = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    try:
        answer = retry(partial(fs.call_s3, "delete_objects", Bucket=bucket, Delete=order), url, patience_s)
    except (NotFoundError, AccessError):
        raise
    except StorageError as error:
        log.debug("storage: no deletion in bulk: %s", error)
        return list(keys)
    return [entry["Key"] for entry in answer.get("Errors", [])]


def _delete_singly(fs: Any, bucket: str, keys: Sequence[str], url: str, patience_s: float) -> None:
    """Raises the first refusal, which is that of all."""

    def delete(key: str) -> None:
        retry(partial(fs.call_s3, "delete_object", Bucket=bucket, Key=key), f"s3://{bucket}/{key}", patience_s)

    delete(keys[0])
    with ThreadPoolExecutor(DELETIONS_AT_ONCE, thread_name_prefix="delete") as pool:
        list(pool.map(delete, keys[1:]))


def check_bucket(fs: Any, path: str, patience_s: float) -> None:
    """Raises within about `patience_s`, with the reason, if the folder of a bucket can't be listed."""
    bucket, prefix = _split(path)
    url = f"s3://{bucket}"
    # A listing, since the answer to a HEAD carries no reason. A store that is slow once is asked again.
    options = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1, "timeout": patience_s / 3}

    def ask() -> None:
        try:
            fs.call_s3("list_objects_v2", **options)
        except Exception as error:
            if is_web_page(error):  # later it can be that of a proxy whose store is away; at the start it is a mistake
                raise StorageError(str(classify(error, url))) from None
            raise

    try:
        retry(ask, url, patience_s, level=logging.DEBUG)
    except (NotFoundError, AccessError):
        raise
    except StorageError as error:
        raise type(error)(f"{error}{wrong_scheme(identity.endpoint())}") from None
