"""What every input of ddpm-shards make offers: so many items, and any one of them by its number."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from ddpm_dist import storage
from ddpm_dist.data.decode import Pixels
from ddpm_dist.errors import DataError

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
    run: int
    """So many consecutive items are read at about the cost of one; 1 where any order is as good."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...


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
    if "://" in path:
        return cast(IO[bytes], io.BufferedReader(RangeFile(path), READ_BUFFER))
    return open(existing(path, what), "rb")


def existing(path: str, what: str) -> Path:
    """The local path, or a DataError that says what was expected there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{path}: no such file or folder; {what} is expected there")
    return found
