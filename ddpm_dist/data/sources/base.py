"""What every input of ddpm-shards make offers: so many items, and any one of them by its number."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import psutil  # type: ignore[import-untyped]

from ddpm_dist import storage
from ddpm_dist.data.decode import BadSampleError, Pixels
from ddpm_dist.data.strict import LFS_POINTER
from ddpm_dist.errors import DataError, DdpmDistError

READ_BUFFER = 2**20


@dataclass(frozen=True)
class Item:
    """An image as the input has it."""

    name: str
    """Where it comes from, a file with its extension; without that, part of its key."""
    image: bytes | Pixels
    """An image file, or [H, W, C] uint8."""
    label: int | None = None


class Source(Protocol):
    """Items 0..len−1. Opening it again, elsewhere, gives the same items in the same order."""

    class_names: tuple[str, ...] | None
    about: dict[str, str]
    """Origin and licence, for the index."""
    notes: tuple[str, ...]
    """What was decided about the input (labels, parts) and what was left out, to be said once."""
    run: int
    """So many consecutive items are read at about the cost of one; 1 where any order is as good."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item:
        """The item; BadSampleError for one that alone can't be read, DataError for an input that can't."""
        ...

    def fingerprint(self, i: int) -> bytes:
        """What item i is by: its name, size or checksum, and label. Reads nothing."""
        ...


class RangeFile(io.RawIOBase):
    """An object at a URL as a seekable file, for libraries that want one."""

    def __init__(self, url: str) -> None:
        self._url, self._size, self._position = url, storage.size(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        length = max(0, min(len(view), self._size - self._position))
        if length:
            view[:length] = storage.read_range(self._url, self._position, length)
        self._position += length
        return length


def open_input(path: str, what: str) -> IO[bytes]:
    """A local file or an object at a URL, seekable; DataError says what was expected there."""
    if "://" in (path := local(path)):
        file = cast(IO[bytes], io.BufferedReader(RangeFile(path), READ_BUFFER))
    else:
        found = existing(path, what)
        if not found.is_file():
            raise DataError(f"{path}: {'a folder' if found.is_dir() else 'no plain file'}, where {what} is expected")
        with reading(path, what):
            file = found.open("rb")
    with reading(path, what):
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path}: a pointer of Git LFS, not the file itself; `git lfs pull` brings it")
        file.seek(0)
    return file


def existing(path: str, what: str) -> Path:
    """The local path, or a DataError that says what was expected there."""
    found = Path(local(path)).expanduser()
    try:
        there = found.exists()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    if not there:
        raise DataError(f"{path}: no such file or folder; {what} is expected there")
    return found


def local(path: str) -> str:
    """A file:// URL as the path that it means; anything else as it is."""
    return path.removeprefix("file://") if path.startswith("file://") else path


def normal(path: str) -> str:
    """One spelling for each place, the same from any working directory."""
    if "://" in (path := local(path)):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def files_below(root: Path, wanted: Callable[[str], bool], notes: list[str]) -> Iterator[tuple[str, str]]:
    """(path below the root, size) of all files, links followed; DataError for what can't be looked into.

    wanted: tells which names matter, so that a link to nothing is an error for them alone.
    notes: gets what is to be said about links that lead round for ever.
    """
    circles: list[str] = []
    waiting = [("", frozenset[tuple[int, int]]())]
    while waiting:
        prefix, above = waiting.pop()
        place = os.path.join(root, prefix)
        with reading(shown(place), "a folder that can be read"):
            here = os.stat(place)
            above = above | {(here.st_dev, here.st_ino)}
            with os.scandir(place) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        if wanted(name):
                            raise DataError(f"{shown(entry.path)}: a link to nothing; mend or remove it")
                        continue
                    found = entry.stat()
                    if entry.is_file():
                        yield name, str(found.st_size)
                    elif entry.is_dir() and (found.st_dev, found.st_ino) in above:
                        circles.append(name)
                    elif entry.is_dir():
                        waiting.append((name + "/", above))
    if circles:
        notes.append(f"not followed: {len(circles)} links to a folder above them ({shown(min(circles))})")


@contextmanager
def reading(place: str, what: str) -> Iterator[None]:
    """What a library raises on somebody's bytes becomes a DataError that names the place; ours pass.

    Parsers raise whatever they like on damaged input (struct.error, KeyError, RecursionError, …), hence all.
    """
    try:
        yield
    except (DdpmDistError, BadSampleError):
        raise
    except MemoryError:
        raise DataError(f"{place}: it asks for more memory than there is; it is damaged, or too large") from None
    except OSError as error:
        if error.strerror:
            raise DataError(f"{place}: can't be read: {error.strerror}; {what} is expected there") from None
        raise DataError(f"{place}: not {what}: {error}") from None
    except Exception as error:
        said = next(iter(str(error).splitlines()), "").rstrip(":") or type(error).__name__
        raise DataError(f"{place}: not {what}: {said}") from None


def check_fits(nbytes: int, place: str) -> None:
    """DataError for an array that memory can't hold, before it is unpacked: a few kB can announce gigabytes."""
    if nbytes > psutil.virtual_memory().available:
        raise DataError(f"{place}: unpacked it has {nbytes} bytes, more than memory holds; it is damaged, or too large")


def shown(name: str) -> str:
    """A file's name for people, also one that isn't UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
