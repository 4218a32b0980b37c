"""Objects at fsspec URLs: read whole or by range, list, publish atomically.

Credentials and the endpoint come from the environment of the process (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …) and never show in an error. Transient errors are retried with
exponential backoff and jitter until `patience_s` is spent; what can't get better by waiting (no such
object, access denied) is raised at once. Everything here may be called from any thread, and after a fork.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ddpm_dist.errors import AccessError, NotFoundError, ShortReadError, StorageError
from ddpm_dist.storage import identity, local, multipart, s3, signing
from ddpm_dist.storage.errors import PATIENCE_S, answer_of, redact, retry
from ddpm_dist.storage.filesystem import filesystem, is_local, is_s3
from ddpm_dist.storage.local import check_folder, copy_file, is_temporary, replace_file, sizes as local_sizes

T = TypeVar("T")
log = logging.getLogger(__name__)


def join(url: str, *parts: str) -> str:
    """URL of an object below a folder."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def read(url: str, patience_s: float = PATIENCE_S) -> bytes:
    """The whole object."""
    fs, path = filesystem(url)
    # One GET: s3fs's parallel parts would cost a HEAD, go without the store's checksum and miss short answers.
    options = {"max_concurrency": 1} if is_s3(fs) else {}
    if is_local(fs):
        return retry(lambda: local.content(path, bytes(fs.cat_file(path))), url, patience_s)
    return _unless_missing(fs, path, url, lambda: retry(lambda: bytes(fs.cat_file(path, **options)), url, patience_s))


def read_range(url: str, start: int, length: int, patience_s: float = PATIENCE_S) -> bytes:
    """Exactly `length` bytes from `start`; ShortReadError if the object ends before (never silence)."""
    if length == 0:
        return b""
    fs, path = filesystem(url)

    def attempt() -> bytes | int:
        try:
            data = bytes(fs.cat_file(path, start=start, end=start + length))
        except OSError as error:
            if answer_of(error)[1] != 416:  # the range begins after the end
                raise
            data = b""
        if len(data) == length:
            return data
        held = int(fs.info(path)["size"])
        if held < start + length:
            return held
        raise ShortReadError(f"{redact(url)}: {len(data)} bytes came for {length} from byte {start}")

    found = _unless_missing(fs, path, url, lambda: retry(attempt, url, patience_s))
    if isinstance(found, int):
        raise ShortReadError(f"{redact(url)}: it holds {found} bytes, where {length} from byte {start} were expected")
    return found


def signed_url(url: str, seconds: int) -> str | None:
    """A URL at which plain HTTP GETs, whole or by range, read an S3 object for so long; None for other stores.

    It holds a signature, no secret, but is one itself: never for a log.
    """
    fs, path = filesystem(url)
    if not is_s3(fs):
        return None
    endpoint = identity.endpoint()
    signed = signing.sign(endpoint, path, seconds) if endpoint else None
    try:
        return signed or str(fs.sign(path, expiration=seconds))
    except Exception:  # no credentials, no region: the other ways in explain it
        return None


def size(url: str, patience_s: float = PATIENCE_S) -> int:
    """Bytes of an object."""
    fs, path = filesystem(url)
    info = _unless_missing(fs, path, url, lambda: retry(lambda: fs.info(path), url, patience_s))
    if info["type"] == "directory":
        raise NotFoundError(f"{redact(url)}: a folder, where an object was expected")
    return int(info["size"])


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
    if is_s3(fs):
        sizes = retry(lambda: s3.sizes(fs, path), url, patience_s)
        return {name: sizes[name] for name in sorted(sizes) if not is_temporary(name)}
    if is_local(fs):
        files = retry(lambda: local_sizes(path), url, patience_s)
        return {name: files[name] for name in sorted(files) if not is_temporary(name)}
    prefix = path.rstrip("/") + "/"
    found = _listing(lambda: fs.find(path, withdirs=False, detail=True), {}, url, patience_s)
    names = [name for name in sorted(found) if name.startswith(prefix) and not name.endswith("/")]
    return {name.removeprefix(prefix): int(found[name]["size"]) for name in names if not is_temporary(name)}


def list_names(url: str, patience_s: float = PATIENCE_S) -> list[str]:
    """Names of objects and folders directly below a folder, sorted; empty if there is none."""
    fs, path = filesystem(url)
    if is_s3(fs):
        return sorted(name for name in retry(lambda: s3.names(fs, path), url, patience_s) if not is_temporary(name))
    prefix = path.rstrip("/") + "/"
    found = _listing(lambda: fs.ls(path, detail=False), [], url, patience_s)
    names = {name.removeprefix(prefix).rstrip("/") for name in found if name.startswith(prefix)}
    return sorted(name for name in names if name and not is_temporary(name))


def publish(url: str, data: bytes | memoryview, patience_s: float = PATIENCE_S) -> None:
    """Writes a whole object: readers see all of it or what was there before. On return it is durable.

    data: any contiguous buffer. Large ones go in parallel parts; no second copy of the whole is made.
    """
    fs, path = filesystem(url)
    view = memoryview(data).cast("B")
    if is_local(fs):
        retry(lambda: replace_file(path, lambda file: file.write(view)), url, patience_s)
    elif is_s3(fs) and view.nbytes > multipart.PART_BYTES:
        multipart.publish(fs, path, view.nbytes, lambda start, end: bytes(view[start:end]), url, patience_s)
    else:
        retry(lambda: put(fs, path, bytes(view)), url, patience_s)


def upload(local: str | Path, url: str, patience_s: float = PATIENCE_S) -> None:
    """Publishes a local file, in parallel parts where the store has them."""
    fs, path = filesystem(url)
    length = os.path.getsize(local)
    if is_local(fs):
        with open(local, "rb") as source:
            retry(lambda: copy_file(source, path), url, patience_s)
    elif is_s3(fs) and length > multipart.PART_BYTES:
        with open(local, "rb") as source:
            descriptor = source.fileno()
            multipart.publish(
                fs, path, length, lambda start, end: os.pread(descriptor, end - start, start), url, patience_s
            )
    else:
        publish(url, Path(local).read_bytes(), patience_s)


def delete(url: str, patience_s: float = PATIENCE_S) -> None:
    """Removes an object; silent if there is none."""
    fs, path = filesystem(url)
    try:
        retry(lambda: fs.rm_file(path), url, patience_s)
    except NotFoundError:
        pass
    except AccessError:
        if exists(url, patience_s):
            raise


def delete_tree(url: str, patience_s: float = PATIENCE_S) -> None:
    """Removes all objects below a folder, and the folder; AccessError if the store keeps some."""
    fs, path = filesystem(url)
    if is_s3(fs):
        s3.delete_all(fs, path, url, patience_s)
        return
    try:
        retry(lambda: fs.rm(path, recursive=True), url, patience_s)
    except NotFoundError:
        pass


def discard(url: str, patience_s: float = PATIENCE_S) -> None:
    """`delete_tree` for what nobody needs any more: work that is done doesn't fail for want of tidiness."""
    try:
        delete_tree(url, patience_s)
    except AccessError as error:
        log.warning("%s stays, as the store lets nobody remove it: %s", redact(url), error)


def abort_uploads(url: str, patience_s: float = PATIENCE_S) -> int:
    """Gives up S3's unfinished multipart uploads below a folder, and returns how many there were.

    A process that is killed while it uploads leaves its parts in the bucket: no listing shows them, the bill does.
    """
    fs, path = filesystem(url)
    return multipart.abort(fs, path, url, patience_s) if is_s3(fs) else 0


def check_access(url: str, name: str | None = None, patience_s: float = 9.0) -> None:
    """Raises within about `patience_s`, with the reason, if the bucket of a URL can't be reached, found or used.

    name: the key or argument that holds the URL, which then begins the message.
    """
    try:
        fs, path = filesystem(url)
        if is_s3(fs):
            s3.check_bucket(fs, path, patience_s)
        elif is_local(fs):
            check_folder(path)
        elif url.startswith(("http://", "https://")):
            raise StorageError(f"{redact(url)}: can't be written; write s3://BUCKET/FOLDER or file:///FOLDER")
    except StorageError as error:
        if name is None:
            raise
        raise type(error)(f"{name}: {error}") from None


def put(fs: Any, path: str, data: bytes, **options: Any) -> None:
    """One attempt at one write, other than to a local file."""
    if is_s3(fs):
        s3.write(fs, lambda: fs.pipe_file(path, data, **options))
    else:
        fs.pipe_file(path, data, **options)


def _unless_missing(fs: Any, path: str, url: str, action: Callable[[], T]) -> T:
    """`action()`, where a refusal of S3 to show what isn't there is a NotFoundError, as everywhere."""
    try:
        return action()
    except StorageError as error:
        if not is_s3(fs) or error.status not in s3.WITHOUT_REASON:
            raise
        raise s3.missing_or_refused(fs, path, url, error) from None


def _listing(action: Callable[[], Any], empty: Any, url: str, patience_s: float) -> Any:
    def attempt() -> Any:
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError):
            return empty

    return retry(attempt, url, patience_s)
