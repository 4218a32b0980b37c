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

Version 1 lists every piece. Of so many ranks that this would be most of the manifest, version 2 says by which rule the
parameters were cut (cut.py); the parts of ranks 128 to 255 are put together in parts-00128.json, and so on (parts.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_dist.engine import Address
from ddpm_dist.errors import DamagedStateError, StateError
from ddpm_dist.state.cut import RULES, Cut

FORMAT = "ddpm_dist training state"
VERSIONS = (1, 2)
PIECES_LISTED = 1 << 16
"""Most pieces that a manifest lists; programs that know version 1 alone read these."""
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

    pieces: list[Address] | None
    """None: what the state's cut gives to the rank."""
    kinds: list[str]
    files: list[File]

    @property
    def elements(self) -> int:
        """Of one kind, of the pieces that are listed."""
        return sum(numel for _, _, numel in self.pieces or ())

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.size for file in self.files)


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
    cut: Cut | None = None
    """How all parameters were cut; None: each part lists its pieces."""

    def pieces(self, rank: int) -> list[Address]:
        """What a rank wrote, in the order of its stream."""
        return self.cut.pieces(rank) if self.cut is not None else list(self.parts[rank].pieces or ())

    def elements(self) -> list[int]:
        """Of one kind, of each rank."""
        return self.cut.elements().tolist() if self.cut is not None else [part.elements for part in self.parts]

    @property
    def kinds(self) -> list[str]:
        """What the state has of each parameter, such as its weights, moments and averages."""
        return self.parts[0].kinds

    @property
    def bytes(self) -> int:
        """Of all files of all ranks, without the JSON."""
        return sum(part.bytes for part in self.parts)


def check_complete(manifest: Manifest, place: str) -> None:
    """Raises DamagedStateError unless the parts hold every element of every parameter exactly once."""
    each = ELEMENT_BYTES * len(manifest.kinds)
    elements, parts = manifest.elements(), manifest.parts
    fitting = len(elements) == len(parts) and all(part.kinds == manifest.kinds for part in parts)
    if not fitting or any(part.bytes != each * number for part, number in zip(parts, elements, strict=True)):
        raise DamagedStateError(f"{place}: its parts don't fit together")
    if manifest.cut is not None:
        return  # a rule leaves nothing out
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for part in parts:
        for name, offset, numel in part.pieces or ():
            held.setdefault(name, []).append((offset, numel))
    for name, ranges in held.items():
        end = 0
        for offset, numel in sorted(ranges):
            if offset != end:
                raise DamagedStateError(f"{place}: elements {end} to {offset} of {name} are not there exactly once")
            end += numel
        if name not in manifest.shapes or end != math.prod(manifest.shapes[name]):
            raise DamagedStateError(f"{place}: {end} elements of {name} don't make the shape it has")


def encode_manifest(manifest: Manifest) -> bytes:
    body = {
        "step": manifest.id.step,
        "attempt": manifest.id.attempt,
        "shapes": manifest.shapes,
        "parts": None,
        "scalars": manifest.scalars,
        "meta": manifest.meta,
        "file_bytes": manifest.file_bytes,
        "block_bytes": manifest.block_bytes,
    }
    cut = manifest.cut
    if cut is not None:
        body |= {"cut": {"rule": cut.rule, "ranks": cut.ranks}}
    return _seal(body, 1 if cut is None else 2, manifest.parts)


def decode_manifest(data: bytes, place: str) -> Manifest:
    """Raises DamagedStateError if it was truncated or altered, StateError if it is of a foreign format."""
    body = _unseal(data, place)
    try:
        shapes, cut = body["shapes"], body.get("cut")
        if cut is not None and cut["rule"] not in RULES.values():
            raise KeyError(cut["rule"])
        numels = {name: math.prod(shape) for name, shape in shapes.items()}
        manifest = Manifest(
            StateId(body["step"], body["attempt"]),
            shapes,
            [_part(part) for part in body["parts"]],
            body["scalars"],
            body["meta"],
            body["file_bytes"],
            body["block_bytes"],
            Cut(cut["rule"], cut["ranks"], numels) if cut is not None else None,
        )
    except (KeyError, TypeError) as error:
        raise DamagedStateError(f"{place}: incomplete: {error}") from None
    check_complete(manifest, place)
    return manifest


def encode_part(part: Part) -> bytes:
    return _seal(_part_body(part), 1 if part.pieces is not None else 2)


def decode_part(data: bytes, place: str) -> Part:
    return _part(_unseal(data, place))


def encode_parts(parts: Sequence[Part]) -> bytes:
    """Of a group of ranks."""
    return _seal({"parts": None}, 2, parts)


def decode_parts(data: bytes, place: str) -> list[Part]:
    return [_part(part) for part in _unseal(data, place)["parts"]]


def _seal(body: Mapping[str, Any], version: int, parts: Sequence[Part] = ()) -> bytes:
    """Two lines of JSON: the format with the hash of the second, and the second.

    One part after another, as the encoder lets no other thread work in between, and the training is one. They stand in
    the place of the body's `"parts": null`.
    """
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    if "parts" in body:
        before, after = text.split('"parts":null', 1)
        encoded = ",".join(json.dumps(_part_body(part), separators=(",", ":")) for part in parts)
        text = f'{before}"parts":[{encoded}]{after}'
    data = text.encode()
    head = {"format": FORMAT, "version": version, "sha256": hashlib.sha256(data).hexdigest()}
    return json.dumps(head).encode() + b"\n" + data + b"\n"


def _unseal(data: bytes, place: str) -> dict[str, Any]:
    head_text, _, text = data.partition(b"\n")
    try:
        head = json.loads(head_text)
        name, version, digest = head["format"], head["version"], head["sha256"]
    except (ValueError, TypeError, KeyError):
        raise DamagedStateError(f"{place}: not a manifest of a training state (foreign, or cut off)") from None
    if name != FORMAT:
        raise DamagedStateError(f"{place}: of a foreign format, {name!r}")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise StateError(f"{place}: written in version {version!r} of the format; this program reads {known}")
    if hashlib.sha256(text.removesuffix(b"\n")).hexdigest() != digest:
        raise DamagedStateError(f"{place}: cut off or altered, its SHA-256 is not the one it states")
    return dict(json.loads(text))


def _part_body(part: Part) -> dict[str, Any]:
    listed = {} if part.pieces is None else {"pieces": part.pieces}
    return {**listed, "kinds": part.kinds, "files": [vars(file) for file in part.files]}


def _part(body: Mapping[str, Any]) -> Part:
    pieces = body.get("pieces")
    listed = None if pieces is None else [(name, offset, numel) for name, offset, numel in pieces]
    return Part(listed, body["kinds"], [File(**file) for file in body["files"]])


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
