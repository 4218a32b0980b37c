"""The format of a training state: pure data, JSON and arithmetic; nothing is read or written here.

    checkpoints/
      owner/000003                  attempt 3 claims the run; names the state that it continues, and the last valid
                                    one of each attempt before
      000001000-0003/               the state of step 1000, written by attempt 3
        00000-000.f32 …             bytes of rank 0: little-endian float32, no header
        00001-000.f32 …             bytes of rank 1
        part-00001.json             rank 1 is done: its pieces and files (rank 0 needs none)
        manifest.json               published last; without it the state doesn't exist

A rank's stream is, kind by kind (weights, exp_avg, exp_avg_sq, then each average), the elements of its
pieces end to end, cut into files of FILE_BYTES. Every file has a SHA-256, and a CRC-32 for every block of
BLOCK_BYTES, so that a reader that needs a range checks just that range.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from ddpm_dist.engine import Address
from ddpm_dist.errors import DamagedStateError, StateError

FORMAT = "ddpm_dist training state"
VERSION = 1
FILE_BYTES = 64 << 20
BLOCK_BYTES = 256 << 10
ELEMENT_BYTES = 4
MANIFEST = "manifest.json"
WEIGHTS = "weights"


@dataclass(frozen=True, order=True)
class StateId:
    """A state by its step (steps done) and the attempt that wrote it; newer states compare greater."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.step:09d}-{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> "StateId | None":
        """The id that a state's folder is named by; None for other names."""
        match = re.fullmatch(r"(\d{9,})-(\d{4,})", name)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class File:
    """A file of a rank's stream."""

    name: str
    size: int
    sha256: str
    crc32: list[int]
    """Of each block; the last may be shorter."""


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    pieces: list[Address]
    kinds: list[str]
    files: list[File]

    @property
    def elements(self) -> int:
        """Of one kind."""
        return sum(numel for _, _, numel in self.pieces)

    def stream_bytes(self) -> int:
        return ELEMENT_BYTES * self.elements * len(self.kinds)


@dataclass(frozen=True)
class Manifest:
    """Everything about a state but its tensors' bytes."""

    id: StateId
    shapes: dict[str, list[int]]
    parts: list[Part]
    scalars: dict[str, Any]
    """Of the optimizer: its step count, the loss scaler."""
    meta: dict[str, Any]
    """Of the run: step, images seen, seed, configuration, versions, counters."""
    file_bytes: int
    """Size of each file of a rank's stream but the last."""
    block_bytes: int
    """Size of what a CRC-32 is of."""

    @property
    def kinds(self) -> list[str]:
        """What the state has of each parameter, such as its weights, moments and averages."""
        return self.parts[0].kinds

    @property
    def bytes(self) -> int:
        """Of all files of all ranks, without the JSON."""
        return sum(file.size for part in self.parts for file in part.files)


@dataclass(frozen=True)
class Segment:
    """Bytes [start, start + size) of a rank's stream, that belong at `target` of what is wanted (in bytes)."""

    rank: int
    start: int
    size: int
    target: int


@dataclass
class Source:
    """Where each element of each kind is stored, for planning reads."""

    manifest: Manifest
    _owned: dict[str, list[tuple[int, int, int, int]]] = field(init=False)
    """name -> (offset, numel, rank, first element in that rank's kind), by offset."""
    _starts: list[dict[str, int]] = field(init=False)
    """For each rank: kind -> its first element in that rank's stream."""

    def __post_init__(self) -> None:
        sizes = [part.elements for part in self.manifest.parts]
        self._starts = [
            {kind: number * size for number, kind in enumerate(part.kinds)}
            for part, size in zip(self.manifest.parts, sizes, strict=True)
        ]
        self._owned = {name: [] for name in self.manifest.shapes}
        for rank, part in enumerate(self.manifest.parts):
            starts = accumulate((numel for _, _, numel in part.pieces), initial=0)
            for (name, offset, numel), start in zip(part.pieces, starts, strict=False):
                self._owned[name].append((offset, numel, rank, start))
        for owned in self._owned.values():
            owned.sort()

    def segments(self, kind: str, name: str, offset: int, numel: int) -> Iterator[Segment]:
        """The stored ranges that make up elements [offset, offset + numel) of a parameter, in order."""
        end = offset + numel
        for at, length, rank, start in self._owned[name]:
            low, high = max(at, offset), min(at + length, end)
            if low < high:
                element = self._starts[rank][kind] + start + low - at
                yield Segment(
                    rank, ELEMENT_BYTES * element, ELEMENT_BYTES * (high - low), ELEMENT_BYTES * (low - offset)
                )


def check_complete(manifest: Manifest, place: str) -> None:
    """Raises DamagedStateError unless the parts hold every element of every parameter exactly once."""
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for part in manifest.parts:
        if part.kinds != manifest.kinds or sum(file.size for file in part.files) != part.stream_bytes():
            raise DamagedStateError(f"{place}: its parts don't fit together")
        for name, offset, numel in part.pieces:
            held.setdefault(name, []).append((offset, numel))
    for name, ranges in held.items():
        end = 0
        for offset, numel in sorted(ranges):
            if offset != end:
                raise DamagedStateError(f"{place}: elements {end} to {offset} of {name} are not there exactly once")
            end += numel
        if name not in manifest.shapes or end != _numel(manifest.shapes[name]):
            raise DamagedStateError(f"{place}: {end} elements of {name} don't make the shape it has")


def encode_manifest(manifest: Manifest) -> bytes:
    body = {
        "step": manifest.id.step,
        "attempt": manifest.id.attempt,
        "shapes": manifest.shapes,
        "parts": [asdict(part) for part in manifest.parts],
        "scalars": manifest.scalars,
        "meta": manifest.meta,
        "file_bytes": manifest.file_bytes,
        "block_bytes": manifest.block_bytes,
    }
    return _seal(body)


def decode_manifest(data: bytes, place: str) -> Manifest:
    """Raises DamagedStateError if it was truncated or altered, StateError if it is of a foreign format."""
    body = _unseal(data, place)
    try:
        manifest = Manifest(
            StateId(body["step"], body["attempt"]),
            body["shapes"],
            [_part(part) for part in body["parts"]],
            body["scalars"],
            body["meta"],
            body["file_bytes"],
            body["block_bytes"],
        )
    except (KeyError, TypeError) as error:
        raise DamagedStateError(f"{place}: incomplete: {error}") from None
    check_complete(manifest, place)
    return manifest


def encode_part(part: Part) -> bytes:
    return _seal(asdict(part))


def decode_part(data: bytes, place: str) -> Part:
    return _part(_unseal(data, place))


def _seal(body: Mapping[str, Any]) -> bytes:
    """Two lines of JSON: the format with the hash of the second, and the second."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(text).hexdigest()}
    return json.dumps(head).encode() + b"\n" + text + b"\n"


def _unseal(data: bytes, place: str) -> dict[str, Any]:
    head_text, _, text = data.partition(b"\n")
    try:
        head = json.loads(head_text)
        name, version, digest = head["format"], head["version"], head["sha256"]
    except (ValueError, TypeError, KeyError):
        raise DamagedStateError(f"{place}: not a manifest of a training state (foreign, or cut off)") from None
    if name != FORMAT:
        raise DamagedStateError(f"{place}: of a foreign format, {name!r}")
    if version != VERSION:
        raise StateError(f"{place}: written in version {version!r} of the format; this program reads {VERSION}")
    if hashlib.sha256(text.removesuffix(b"\n")).hexdigest() != digest:
        raise DamagedStateError(f"{place}: cut off or altered, its SHA-256 is not the one it states")
    return dict(json.loads(text))


def _part(body: Mapping[str, Any]) -> Part:
    pieces = [(name, offset, numel) for name, offset, numel in body["pieces"]]
    return Part(pieces, body["kinds"], [File(**file) for file in body["files"]])


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def valid_states(claims: Mapping[int, StateId | None], published: Sequence[StateId]) -> list[StateId]:
    """Of all states with a manifest, those of the run's history, newest first.

    claims: attempt -> the state that it continues (None: it began anew). The newest attempt's own states are
    valid; of the attempt that wrote what it continues, those up to that state; and so on. What an older
    attempt writes after it was succeeded is void, so a process that was cut off can't spoil the run.
    """
    if not claims:
        return []
    limits: dict[int, float] = {}
    attempt, limit = max(claims), float("inf")
    while True:
        limits[attempt] = limit
        continued = claims.get(attempt)
        if continued is None:
            break
        attempt, limit = continued.attempt, continued.step
    return states_within(limits, published)


def states_within(limits: Mapping[int, float], published: Sequence[StateId]) -> list[StateId]:
    """Of all states with a manifest those up to their attempt's last valid step, newest first."""
    return sorted((s for s in published if s.step <= limits.get(s.attempt, -1)), reverse=True)


def last_of_each(valid: Sequence[StateId]) -> tuple[StateId, ...]:
    """The newest state of each attempt, by attempt: with it a claim says of all states whether they are valid."""
    newest = {state.attempt: state for state in sorted(valid)}
    return tuple(newest[attempt] for attempt in sorted(newest))


def kept_states(
    valid: Sequence[StateId], keep_last: int, keep_every: int | None, protected: Sequence[StateId]
) -> set[StateId]:
    """The states that retention keeps: the last ones, those at multiples of keep_every, protected ones.

    At least two are kept, so that a damaged one has a predecessor, and so that what a new attempt is just
    claiming isn't deleted by the one that it succeeds.
    """
    newest = sorted(valid, reverse=True)[: max(keep_last, 2)]
    regular = [s for s in valid if keep_every is not None and s.step % keep_every == 0]
    return {*newest, *regular, *(s for s in protected if s in valid)}
