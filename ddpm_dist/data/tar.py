"""Tar shards: WebDataset's own stages to write and to read samples, and a walk over headers that misses nothing.

WebDataset's reader ends silently at a tar that is cut between members or inside a header. `walk` tells
where every sample lies, so that the loader reads by offset and never parses a header, and it raises on
anything that a whole tar would not contain.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import webdataset
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from ddpm_dist.errors import ShardError

BLOCK = 512
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "npy", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff", "img", "image")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes lie."""

    key: str
    extension: str
    offset: int
    size: int


def write_tar(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A shard of (key, {extension: bytes}), by WebDataset's writer; the same samples give the same bytes."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="", group="") as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})
    return buffer.getvalue()


def read_tar(stream: io.BufferedIOBase | io.RawIOBase, url: str) -> Iterator[dict[str, Any]]:
    """Samples {"__key__": …, extension: bytes} of a tar, by WebDataset's stages; for inputs that have no index."""
    yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))


def walk(data: bytes | memoryview, name: str) -> list[list[Member]]:
    """The samples of a tar, each with its members; raises ShardError where a whole tar would not look so.

    Grouping is WebDataset's: consecutive files with the same path up to the first dot of the file's name.
    """
    samples: list[list[Member]] = []
    for path, offset, size in _files(data, name):
        if _META.match(path):
            continue
        key, extension = base_plus_ext(path)
        if key is None:
            continue
        member = Member(key, extension.lower(), offset, size)
        if samples and samples[-1][0].key == key:
            samples[-1].append(member)
        else:
            samples.append([member])
    return samples


def _files(data: bytes | memoryview, name: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of all regular files; demands the two zero blocks that end a tar."""
    if not data:
        raise ShardError(f"{name}: an empty object, not a tar")
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for info in archive:
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK if info.isreg() else info.offset_data
                if end > len(data):
                    raise ShardError(f"{name}: truncated inside {info.name}, at byte {len(data)} of at least {end}")
                if info.issparse():
                    raise ShardError(f"{name}: {info.name} is a sparse file, which shards can't have")
                if info.isreg():
                    yield info.name, info.offset_data, info.size
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps a TarInfo of each member
    except (tarfile.TarError, UnicodeError, ValueError) as error:
        raise ShardError(f"{name}: not a whole tar: {error}") from None
    # tarfile ends silently at a header that is cut or altered, so what ends a tar has to be there.
    rest = bytes(data[end:])
    if len(rest) < 2 * BLOCK:
        raise ShardError(f"{name}: truncated: {len(rest)} bytes follow the last whole file, at least {2 * BLOCK} must")
    if rest.count(0) != len(rest):
        raise ShardError(f"{name}: altered: a header at byte {end} is not one, or files follow the end of the tar")
