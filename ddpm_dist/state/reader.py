"""Reading of training states: the manifest, the ranges of the files that are needed, and their checks."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.engine import bytes_of
from ddpm_dist.errors import DamagedStateError, NotFoundError, ShortReadError, StateError
from ddpm_dist.state import format as fmt
from ddpm_dist.state.source import Source

DOWNLOADS = 16
"""Ranges fetched at once."""
RANGE_BYTES = 8 << 20
"""Largest range of one request."""
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Target:
    """A 1-D float32 tensor to fill with elements [offset, offset + numel) of a parameter, of one kind."""

    kind: str
    name: str
    offset: int
    tensor: Tensor


@dataclass(frozen=True)
class _Copy:
    """Bytes of a file that belong at `at` of a buffer."""

    start: int
    size: int
    buffer: memoryview
    at: int


def read_manifest(state_url: str) -> fmt.Manifest:
    """Raises NotFoundError if the state doesn't exist, DamagedStateError or StateError if it can't be used."""
    return decode_manifest(state_url, manifest_bytes(state_url))


def manifest_bytes(state_url: str) -> bytes:
    """Raises NotFoundError if the state doesn't exist."""
    return storage.read(storage.join(state_url, fmt.MANIFEST), PATIENCE_S)


def decode_manifest(state_url: str, data: bytes) -> fmt.Manifest:
    """Of `manifest_bytes`; raises DamagedStateError or StateError if it can't be used."""
    return fmt.decode_manifest(data, storage.redact(storage.join(state_url, fmt.MANIFEST)))


def read_into(state_url: str, manifest: fmt.Manifest, targets: Sequence[Target], source: Source | None = None) -> int:
    """Fills the targets from the store, in parallel, and returns the bytes fetched. source: of this manifest, for who
    reads more than once.

    Every block that is touched is compared with its checksum; DamagedStateError names the first that differs.
    """
    hosts = [_host_of(target.tensor) for target in targets]
    copies = _plan(source or Source(manifest), targets, [bytes_of(host) for host in hosts])
    files = {file.name: file for part in manifest.parts for file in part.files}
    block = manifest.block_bytes
    ranges = [
        (files[name], low, high, part) for name, todo in copies.items() for low, high, part in _ranges(todo, block)
    ]
    with ThreadPoolExecutor(DOWNLOADS, "state-read") as pool:
        fetched = sum(pool.map(lambda r: _fetch(state_url, block, *r), ranges))
    for target, host in zip(targets, hosts, strict=True):
        if host is not target.tensor:
            target.tensor.copy_(host)
    return fetched


def read_full(state_url: str, manifest: fmt.Manifest, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full float32 tensor on the CPU) of a kind, such as `weights` or `ema`."""
    if kind not in manifest.kinds:
        raise StateError(f"{storage.redact(state_url)}: has no {kind!r}; it has {', '.join(manifest.kinds)}")
    source = Source(manifest)
    for name, shape in manifest.shapes.items():
        tensor = torch.empty(shape, dtype=torch.float32)
        read_into(state_url, manifest, [Target(kind, name, 0, tensor.view(-1))], source)
        yield name, tensor


def verify(state_url: str, manifest: fmt.Manifest) -> None:
    """Reads every file whole; raises DamagedStateError that names the first one that isn't what was written."""

    def check(file: fmt.File) -> None:
        url = storage.join(state_url, file.name)
        try:
            data = storage.read(url, PATIENCE_S)
        except NotFoundError:
            raise DamagedStateError(f"{storage.redact(url)}: missing") from None
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            raise DamagedStateError(f"{storage.redact(url)}: {len(data)} bytes that are not those that were written")

    with ThreadPoolExecutor(DOWNLOADS // 4, "state-verify") as pool:
        for _ in pool.map(check, [file for part in manifest.parts for file in part.files]):
            pass


def check_fits(manifest: fmt.Manifest, shapes: dict[str, torch.Size], kinds: Sequence[str], place: str) -> None:
    """Raises StateError with the differences unless the state has these parameters and kinds."""
    wrong = [f"no {kind}" for kind in kinds if kind not in manifest.kinds]
    for name in sorted({*manifest.shapes, *shapes}):
        theirs, ours = manifest.shapes.get(name), shapes.get(name)
        if ours is None or theirs != list(ours):
            wrong.append(f"{name}: {theirs or 'absent'} there, {list(ours) if ours is not None else 'absent'} here")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise StateError(
            f"{place}: is of another network or configuration ({'; '.join(wrong[:5])}{more}); use another run.url"
        )


def _host_of(tensor: Tensor) -> Tensor:
    """The tensor itself where its bytes can be written directly, else a buffer of its size."""
    assert tensor.dtype == torch.float32, "all that a state holds is float32"
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.numel(), dtype=torch.float32)


def _plan(source: Source, targets: Sequence[Target], buffers: Sequence[memoryview]) -> dict[str, list[_Copy]]:
    """File name -> what is needed of it."""
    manifest = source.manifest
    ends: dict[int, list[int]] = {}
    copies: dict[str, list[_Copy]] = {}
    for target, buffer in zip(targets, buffers, strict=True):
        for segment in source.segments(target.kind, target.name, target.offset, target.tensor.numel()):
            files = manifest.parts[segment.rank].files
            if segment.rank not in ends:
                ends[segment.rank] = list(accumulate(file.size for file in files))
            position, at, left = segment.start, segment.target, segment.size
            while left:
                index = position // manifest.file_bytes
                size = min(left, ends[segment.rank][index] - position)
                copy = _Copy(position - index * manifest.file_bytes, size, buffer, at)
                copies.setdefault(files[index].name, []).append(copy)
                position, at, left = position + size, at + size, left - size
    return copies


def _ranges(copies: list[_Copy], block_bytes: int) -> Iterator[tuple[int, int, list[_Copy]]]:
    """Merges copies into (first block, end block, its copies), each at most RANGE_BYTES or one copy long."""
    low = high = -1
    group: list[_Copy] = []
    for copy in sorted(copies, key=lambda c: c.start):
        first = copy.start // block_bytes
        end = -(-(copy.start + copy.size) // block_bytes)
        if group and first <= high and (max(high, end) - low) * block_bytes <= RANGE_BYTES:
            high = max(high, end)
            group.append(copy)
        else:
            if group:
                yield low, high, group
            low, high, group = first, end, [copy]
    if group:
        yield low, high, group


def _fetch(state_url: str, block_bytes: int, file: fmt.File, first: int, end: int, copies: list[_Copy]) -> int:
    """Reads blocks [first, end) of a file, checks each, and copies what is wanted of them."""
    url = storage.join(state_url, file.name)
    start = first * block_bytes
    size = min(end * block_bytes, file.size) - start
    try:
        data = memoryview(storage.read_range(url, start, size, PATIENCE_S))
    except NotFoundError:
        raise DamagedStateError(f"{storage.redact(url)}: missing") from None
    except ShortReadError as error:
        raise DamagedStateError(f"{storage.redact(url)}: cut off: {error}") from None
    for block in range(first, end):
        at = (block - first) * block_bytes
        if zlib.crc32(data[at : at + block_bytes]) != file.crc32[block]:
            raise DamagedStateError(
                f"{storage.redact(url)}: bytes from {block * block_bytes} are not those that were written"
            )
    for copy in copies:
        copy.buffer[copy.at : copy.at + copy.size] = data[copy.start - start : copy.start - start + copy.size]
    return size
