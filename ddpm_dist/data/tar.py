"""Tar shards: written byte for byte as WebDataset writes them, read by its stages, and by a walk that misses nothing.

The library itself is imported to read alone, since it brings torch: seconds for each process that makes or indexes
shards. What stands here in its place (`write_tar`, FIRST_DOT) is held to it by tests. WebDataset's reader ends silently
at a tar that is cut between members or inside a header. `walk` tells where every sample lies, so that the loader reads
by offset and never parses a header, and it raises on anything that a whole tar would not contain.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from ddpm_dist.data.strict import LFS_POINTER
from ddpm_dist.errors import ShardError, StorageError

BLOCK = 512
MAX_HEADER_BYTES = 2**22
"""Of long names and PAX attributes."""
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", "npy", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff", "img", "image"),
    *("avif", "jfif", "jpe"),
)
CLUTTER_FOLDERS = frozenset(("__MACOSX", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".ipynb_checkpoints", ".cache"))
OTHERS = {
    LFS_POINTER: "a pointer of Git LFS, not the file itself; `git lfs pull` brings it",
    b"\x1f\x8b": "compressed by gzip; shards are plain tars, which can be read from their middle: gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; shards are plain tars: unzstd",
    b"BZh91AY&SY": "compressed by bzip2; shards are plain tars: bunzip2",
    b"\xfd7zXZ\0": "compressed by xz; shards are plain tars: unxz",
    b"PK\x03\x04": "a zip; shards are plain tars, ddpm-shards make zip makes some of it",
}
_META = re.compile(r"__[^/]*__($|/)")
_BASE_PLUS_EXT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
"""As `webdataset.tariterators.base_plus_ext`."""
MODE = 0o444
"""Of the files in a shard."""

SplitPath = Callable[[str], tuple[str | None, str]]
FIRST_DOT, LAST_DOT = "first-dot", "last-dot"


def _last_dot(path: str) -> tuple[str | None, str]:
    folder, slash, name = path.rpartition("/")
    key, dot, extension = name.rpartition(".")
    return (folder + slash + key, extension) if dot and key else (None, "")


def _first_dot(path: str) -> tuple[str | None, str]:
    found = _BASE_PLUS_EXT.match(path)
    return (found[1], found[2]) if found else (None, "")


KEYS: Mapping[str, SplitPath] = {FIRST_DOT: _first_dot, LAST_DOT: _last_dot}
"""Where a sample's key ends in the name of a file: (key or None, extension) of a path."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes lie."""

    key: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class File:
    """A file in a tar, before it is part of a sample."""

    path: str
    offset: int
    size: int
    kind: str = ""
    """"" for a regular file, or why WebDataset passes it over: "hard link", "symbolic link", "special file"."""
    target: str = ""
    """Path of the file that a link stands for."""


@dataclass(frozen=True)
class Contents:
    """The samples of a tar, and what it holds beside them."""

    samples: list[list[Member]]
    left_out: dict[str, list[str]]
    """{what it is: paths} of files that belong to no sample."""


def write_tar(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A shard of (key, {extension: bytes}), as WebDataset's TarWriter writes it: the same samples, the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as archive:
        for key, files in samples:
            for extension, data in sorted(files.items()):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(data), MODE
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_tar(
    stream: io.BufferedIOBase | io.RawIOBase, url: str, split: SplitPath = KEYS[FIRST_DOT]
) -> Iterator[dict[str, Any]]:
    """Samples {"__key__": …, extension: bytes} of a tar, by WebDataset's stages: what another reader makes of it.

    Raises what WebDataset and tarfile raise. Clutter is passed over, as by `walk`.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

    files = tar_file_expander([{"url": url, "stream": stream}], select_files=lambda path: not is_clutter(path))
    yield from group_by_keys(files, keys=base_plus_ext if split is KEYS[FIRST_DOT] else split)


def walk(data: bytes | memoryview, name: str, split: SplitPath = KEYS[FIRST_DOT]) -> list[list[Member]]:
    """The samples of a tar, each with its members; raises ShardError where a whole tar would not look so."""
    return contents(data, name, split).samples


def contents(data: bytes | memoryview, name: str, split: SplitPath = KEYS[FIRST_DOT]) -> Contents:
    """As `walk`, with what belongs to no sample.

    Grouping is WebDataset's: consecutive files with the same key, which is the path up to the first dot of the file's
    name, or what `split` makes of it.
    """
    samples: list[list[Member]] = []
    extensions: set[str] = set()
    left_out: dict[str, list[str]] = {}
    for file in files(io.BytesIO(data), len(data), name):
        key, extension = split(file.path)
        why = file.kind or ("hidden file" if is_clutter(file.path) else "")
        if not why and (_META.match(file.path) or key is None):
            why = "extensionless file" if key is None else "reserved file"
        if why or key is None:
            left_out.setdefault(why, []).append(file.path)
            continue
        member = Member(key, extension.lower(), file.offset, file.size)
        if not samples or samples[-1][0].key != key:
            samples.append([])
            extensions.clear()
        if member.extension in extensions:
            raise ShardError(
                f"{name}: {file.path}: sample {key} has a member .{member.extension} twice, and nothing says which is "
                f"meant; remove one"
            )
        samples[-1].append(member)
        extensions.add(member.extension)
    return Contents(samples, left_out)


def is_clutter(path: str) -> bool:
    """Whether a file is one that systems leave behind: macOS' ._name beside name, .DS_Store, notebooks' copies."""
    *folders, last = path.split("/")
    return last.startswith(".") or not CLUTTER_FOLDERS.isdisjoint(folders)


def files(stream: IO[bytes], size: int, name: str) -> Iterator[File]:
    """All files of a tar in a seekable stream of `size` bytes, in order; only headers are read.

    Raises ShardError for anything that a whole tar wouldn't hold, at the latest at its end: a header that is cut or
    altered, sizes that lead backwards or beyond the end, a second tar after the first, no end.
    """
    if not size:
        raise ShardError(f"{name}: an empty object, not a tar")
    _refuse_others(stream, name)
    end = 0
    try:
        with tarfile.open(
            fileobj=cast(IO[bytes], _Headers(stream)), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            for info in archive:
                before, end = end, int(archive.offset)
                file = _file(info, name)
                if end <= before or info.size < 0:
                    raise ShardError(f"{name}: altered: {file.path} has an impossible size, {info.size} bytes")
                if end > size:
                    raise ShardError(f"{name}: truncated inside {file.path}, at byte {size} of at least {end}")
                if not info.isdir():
                    yield file
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps a TarInfo of each member
    except (ShardError, StorageError):
        raise
    except Exception as error:  # tarfile meets altered headers with errors of every kind
        raise ShardError(f"{name}: not a whole tar: {error or type(error).__name__}") from None
    # tarfile ends silently at a header that is cut or altered, so what ends a tar has to be there.
    if size - end < 2 * BLOCK:
        raise ShardError(f"{name}: truncated: {size - end} bytes follow the last whole file, at least {2 * BLOCK} must")
    stream.seek(end)
    while rest := stream.read(2**20):
        if rest.count(0) != len(rest):
            raise ShardError(f"{name}: altered: a header at byte {end} is not one, or files follow the end of the tar")


def _refuse_others(stream: IO[bytes], name: str) -> None:
    """ShardError for what is often found in a shard's place."""
    stream.seek(0)
    head = stream.read(max(map(len, OTHERS)))
    stream.seek(0)
    found = next((what for start, what in OTHERS.items() if head.startswith(start)), None)
    if found:
        raise ShardError(f"{name}: {found}")


def _file(info: tarfile.TarInfo, name: str) -> File:
    try:
        info.name.encode()
    except UnicodeEncodeError:
        raw = info.name.encode("utf-8", "surrogateescape")
        raise ShardError(f"{name}: a file's name isn't UTF-8: {raw!r}; keys have to be") from None
    if info.issparse():
        raise ShardError(f"{name}: {info.name} is a sparse file, which shards can't have")
    if info.isreg():
        return File(info.name, info.offset_data, info.size)
    kind = "hard link" if info.islnk() else "symbolic link" if info.issym() else "special file"
    return File(info.name, info.offset_data, 0, kind, info.linkname)


class _Headers:
    """A stream for tarfile, which asks for as many bytes as a header says, or for all if it says less than none."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, length: int) -> bytes:
        if not 0 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes at byte {self._stream.tell()}")
        return self._stream.read(length)
