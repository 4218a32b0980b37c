"""What every input of tools/make_shards.py offers: so many items, and any one of them by its number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ddpm_dist.data.decode import Pixels
from ddpm_dist.errors import DataError


@dataclass(frozen=True)
class Item:
    """An image as the input has it."""

    name: str
    """Where it comes from; part of its key."""
    image: bytes | Pixels
    """An image file, or [H, W, C] uint8."""
    label: int | None = None


class Source(Protocol):
    """Items 0..len−1. Opening it again, elsewhere, gives the same items in the same order."""

    class_names: tuple[str, ...] | None
    about: dict[str, str]
    """Origin and licence, for the index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...


def existing(path: str, what: str) -> Path:
    """The path, or a DataError that says what was expected there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{path}: no such file or folder; {what} is expected there")
    return found
