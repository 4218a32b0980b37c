"""Local files that appear whole and stay: written beside their place, synced, then renamed or linked."""

import errno
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ddpm_dist.errors import AccessError, NotFoundError, ShortReadError, StorageError

ONCE = b"ddpm_dist once "
"""How a file begins that was created where a disk has no hard links: with its length and hash, to tell it is whole."""
WRITTEN_WITHIN_S = 5.0
WITHOUT_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EMLINK}


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file in the making, or one that a killed writer left."""
    return re.search(r"\.[0-9]+\.[0-9a-f]{8}\.tmp$", name) is not None


def check_folder(path: str) -> None:
    """Raises StorageError unless there is, or can be, a folder that this process may write to."""
    there = Path(path)
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise StorageError(f"file://{path}: {there} is a file, where a folder is expected")
    if not os.access(there, os.W_OK | os.X_OK):
        raise AccessError(f"file://{path}: {there} can't be written to by this user")


def sizes(path: str) -> dict[str, int]:
    """{path below the folder: bytes} of all files, links followed, but not round for ever; empty without a folder.

    OSError for a folder that can't be looked into. A link to nothing is a file of no bytes: it fails when it is read.
    """
    found: dict[str, int] = {}
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        try:
            here = os.stat(os.path.join(path, prefix))
            entries = list(os.scandir(os.path.join(path, prefix)))
        except (FileNotFoundError, NotADirectoryError):  # never there, or gone by now
            continue
        above |= {(here.st_dev, here.st_ino)}
        for entry in entries:
            try:
                state = entry.stat()
            except OSError:
                found |= {prefix + entry.name: 0} if entry.is_symlink() else {}
                continue
            if not entry.is_dir():
                found[prefix + entry.name] = state.st_size
            elif (state.st_dev, state.st_ino) not in above:
                waiting.append((f"{prefix}{entry.name}/", above))
    return found


def replace_file(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Creates or replaces a file with what `write` writes; the folders above it are made."""
    temporary = _write_temporary(path, write)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _make_name_durable(path)


def copy_file(source: BinaryIO, path: str) -> None:
    """`replace_file` with the bytes of an open file."""
    source.seek(0)
    replace_file(path, lambda file: shutil.copyfileobj(source, file, 2**20))


def create_file(path: str, data: bytes) -> None:
    """Creates a file whole; FileExistsError if there is one, for all but one of many who try at once."""
    temporary = _write_temporary(path, lambda file: file.write(data))
    try:
        os.link(temporary, path)  # unlike a rename, it fails if the name is taken
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        _create_exclusively(path, data)
    finally:
        os.unlink(temporary)
    _make_name_durable(path)


def content(path: str, data: bytes) -> bytes:
    """What a file holds: without the line that goes before it where a disk has no hard links.

    ShortReadError for one that is being written, NotFoundError for one whose writer was killed in the middle.
    """
    if not data.startswith(ONCE) and not (len(data) < len(ONCE) and ONCE.startswith(data) and data):
        return data
    head, newline, rest = data.partition(b"\n")
    if newline and head == _head(rest):
        return rest
    if time.time() - os.stat(path).st_mtime < WRITTEN_WITHIN_S:
        raise ShortReadError(f"file://{path}: it is being written")
    raise NotFoundError(f"file://{path}: incomplete, as its writer was killed; it counts for nothing")


def _head(data: bytes) -> bytes:
    return b"%s%d %s" % (ONCE, len(data), hashlib.sha256(data).hexdigest().encode())


def _create_exclusively(path: str, data: bytes) -> None:
    """As `create_file` on exFAT, SMB or gcsfuse: the name is taken first and filled then, so the file says when it is
    whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_head(data) + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(path)
        raise


def _write_temporary(path: str, write: Callable[[BinaryIO], object]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{random.getrandbits(32):08x}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def _make_name_durable(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS | {errno.EBADF}:  # SMB and FUSE know no such thing
            raise
    finally:
        os.close(folder)
