"""Objects at fsspec URLs: read whole or by range, list, publish atomically, create once.

Credentials and the endpoint come from the environment of the process (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …) and never show in an error. Transient errors are retried with
exponential backoff and jitter until `patience_s` is spent; what can't get better by waiting (no such
object, access denied) is raised at once.
"""

import io
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from ddpm_dist.errors import (
    AccessError,
    DdpmDistError,
    NotFoundError,
    ShortReadError,
    StorageError,
    UnreachableError,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Default time in which an outage of the store may end."""
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
CONNECTIONS = 32
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL; one filesystem per process, protocol and endpoint."""
    protocol, colon, _ = url.partition("://")
    if not colon:
        raise StorageError(f"{redact(url)}: not a URL; write file://{Path(url).absolute()} or s3://bucket/folder")
    options: dict[str, Any] = {}
    if protocol == "s3":
        options = {
            "use_listings_cache": False,
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            "config_kwargs": {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": CONNECTIONS,
                "retries": {"max_attempts": 1},
            },
        }
    elif protocol == "file":
        options = {"auto_mkdir": True}
    try:
        return url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{redact(url)}: {error}") from None


def join(url: str, *parts: str) -> str:
    """URL of an object below a folder."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def read(url: str, patience_s: float = PATIENCE_S) -> bytes:
    """The whole object."""
    fs, path = filesystem(url)
    return retry(lambda: fs.cat_file(path), url, patience_s)


def read_range(url: str, start: int, length: int, patience_s: float = PATIENCE_S) -> bytes:
    """Exactly `length` bytes from `start`; ShortReadError if the object ends before (never silence)."""
    fs, path = filesystem(url)

    def attempt() -> bytes:
        data = fs.cat_file(path, start=start, end=start + length)
        if len(data) != length:
            raise ShortReadError(f"{redact(url)}: {len(data)} bytes came for {length} from byte {start}")
        return data

    return retry(attempt, url, patience_s)


def size(url: str, patience_s: float = PATIENCE_S) -> int:
    """Bytes of an object."""
    fs, path = filesystem(url)
    return int(retry(lambda: fs.info(path), url, patience_s)["size"])


def exists(url: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether there is such an object (not folder)."""
    try:
        size(url, patience_s)
    except NotFoundError:
        return False
    return True


def list_objects(url: str, patience_s: float = PATIENCE_S) -> dict[str, int]:
    """{path below url: bytes} of all objects below a folder, sorted; empty if there is none."""
    fs, path = filesystem(url)
    prefix = path.rstrip("/") + "/"

    def attempt() -> dict[str, int]:
        try:
            found = fs.find(path, withdirs=False, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(prefix): int(found[name]["size"]) for name in sorted(found) if name != path}

    return retry(attempt, url, patience_s)


def list_names(url: str, patience_s: float = PATIENCE_S) -> list[str]:
    """Names of objects and folders directly below a folder, sorted; empty if there is none."""
    fs, path = filesystem(url)

    def attempt() -> list[str]:
        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    return retry(attempt, url, patience_s)


def publish(url: str, data: bytes | memoryview, patience_s: float = PATIENCE_S) -> None:
    """Writes a whole object: readers see all of it or what was there before."""
    fs, path = filesystem(url)
    if _is_local(fs):
        retry(lambda: _replace_local(path, data), url, patience_s)
    else:
        retry(lambda: fs.pipe_file(path, bytes(data)), url, patience_s)


def upload(local: str | Path, url: str, patience_s: float = PATIENCE_S) -> None:
    """Publishes a local file, in parallel parts where the store has them."""
    fs, path = filesystem(url)
    if _is_local(fs):
        publish(url, Path(local).read_bytes(), patience_s)
    else:
        retry(lambda: fs.put_file(str(local), path), url, patience_s)


def create(url: str, data: bytes, patience_s: float = PATIENCE_S) -> bool:
    """Writes an object if there is none; False if there was. Of many who try at once, one succeeds.

    After a lost answer the object can be our own: it is then compared, so `data` should be unique.
    """
    fs, path = filesystem(url)

    def attempt() -> bool:
        try:
            if _is_local(fs):
                _link_local(path, data)
            else:
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return bool(fs.cat_file(path) == data)
        return True

    return retry(attempt, url, patience_s)


def delete(url: str, patience_s: float = PATIENCE_S) -> None:
    """Removes an object; silent if there is none."""
    fs, path = filesystem(url)
    try:
        retry(lambda: fs.rm_file(path), url, patience_s)
    except NotFoundError:
        pass


def delete_tree(url: str, patience_s: float = PATIENCE_S) -> None:
    """Removes all objects below a folder, and the folder."""
    fs, path = filesystem(url)
    try:
        retry(lambda: fs.rm(path, recursive=True), url, patience_s)
    except NotFoundError:
        pass


def check_access(url: str, patience_s: float = 8.0) -> None:
    """Raises at once, with the reason, if the bucket of a URL can't be reached, found or used."""
    fs, path = filesystem(url)
    if _is_s3(fs):
        bucket = path.split("/")[0]
        retry(lambda: fs.call_s3("head_bucket", Bucket=bucket), f"s3://{bucket}", patience_s)
        retry(lambda: fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1), f"s3://{bucket}", patience_s)


def retry(action: Callable[[], T], url: str, patience_s: float = PATIENCE_S) -> T:
    """`action()`, again after transient errors until `patience_s` is over; raises a StorageError."""
    deadline = time.monotonic() + patience_s
    attempt = 0
    while True:
        try:
            return action()
        except DdpmDistError as error:
            if not isinstance(error, ShortReadError):
                raise
            failure: StorageError = error
        except Exception as error:  # fsspec's back ends raise what they like; classify() decides
            failure = classify(error, url)
            if not isinstance(failure, UnreachableError):
                raise failure from None
        pause = min(5.0, 0.1 * 2**attempt) * (0.5 + random.random() / 2)  # noqa: S311 - jitter
        attempt += 1
        if time.monotonic() + pause > deadline:
            raise failure from None
        log.warning("storage: %s; attempt %d in %.1f s", failure, attempt + 1, pause)
        time.sleep(pause)


def classify(error: BaseException, url: str) -> StorageError:
    """The StorageError that says what an exception of a back end means for the user."""
    place, kind, text = redact(url), type(error).__name__, redact(str(error))
    if isinstance(error, FileNotFoundError):
        what = "no such bucket" if "bucket" in text.lower() else "not found"
        return NotFoundError(f"{place}: {what}")
    if isinstance(error, PermissionError) or "Credentials" in kind or re.search(r"Forbidden|AccessDenied|403", text):
        remedy = "" if place.startswith("file") else "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on this node"
        return AccessError(f"{place}: access refused ({text or kind}){remedy}")
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError, ValueError, TypeError)):
        return StorageError(f"{place}: {kind}: {text}")
    if isinstance(error, OSError) and error.errno in _FATAL_ERRNO:
        return StorageError(f"{place}: {error.strerror or text}")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    at = f" (AWS_ENDPOINT_URL is {redact(endpoint)})" if endpoint and place.startswith("s3://") else ""
    return UnreachableError(f"{place}: the store doesn't answer: {kind}: {text}{at}")


_FATAL_ERRNO = {28, 30, 36, 122}  # disk full, read-only, name too long, quota


def redact(text: str) -> str:
    """Text without user:password@, query strings of URLs, and values of secret environment variables."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", text)
    for name in _SECRETS:
        value = os.environ.get(name)
        if value:
            text = text.replace(value, f"${name}")
    return text


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,))


def _is_s3(fs: Any) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,))


def _write_temporary(path: str, data: bytes | memoryview) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{random.getrandbits(32):08x}.tmp"  # noqa: S311
    with io.open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _replace_local(path: str, data: bytes | memoryview) -> None:
    temporary = _write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _link_local(path: str, data: bytes) -> None:
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)


def clear_instances() -> None:
    """Forgets cached filesystems, after a change of endpoint or credentials in this process."""
    fsspec.filesystem("memory")  # makes sure that the registry is loaded
    for cls in list(fsspec.registry.values()):
        cls.clear_instance_cache()
