"""Writes data sets: deterministic WebDataset shards, each published whole, and the index at the end."""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data import decode, tar, upright
from ddpm_dist.data.index import (
    LYING,
    NO_LABEL,
    ROW,
    DataIndex,
    SampleTable,
    Schema,
    ShardInfo,
    content_hash,
    save_index,
    table_name,
)
from ddpm_dist.data.reading import REMEDY, Reading, class_of, image_of, names_among, shown_members
from ddpm_dist.errors import DataError

PATHS_SHOWN = 3
IMAGELESS, UNREADABLE, PHOTO, OTHER = "imageless sample", "unreadable image", "photo", "other member"
OWN = Reading()
"""How this project's own shards are read."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it stands in a shard: members `<key>.<extension>` and, with a label, `<key>.cls`."""

    key: str
    """Unique in the set; no dot after the last slash."""
    image: bytes
    """An image file (PNG, JPEG, WebP, …) or `.npy` of [H, W, C] uint8."""
    extension: str
    label: int | None = None


@dataclass(frozen=True)
class ShardSummary:
    """What a shard contributes to the schema."""

    formats: Mapping[str, int]
    min_size: tuple[int, int]
    max_size: tuple[int, int]
    classes: int
    """Largest label + 1; 0 without labels."""
    notes: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    """{what it is: (its number, some paths)} of files that belong to no sample, and of samples to know about."""
    names: tuple[str, ...] = ()
    """Names of the classes of this shard, where they aren't numbers."""
    labels: Sequence[int] | None = None
    """Labels of the samples as first read, kept while a set of others is indexed; see `foreign`."""


@dataclass(frozen=True)
class WrittenShard:
    """What the index needs to know of a shard that lies in the store."""

    info: ShardInfo
    summary: ShardSummary


def shard_bytes(samples: Iterable[EncodedSample]) -> bytes:
    """The tar of some samples; the same samples give the same bytes."""
    return tar.write_tar((sample.key, _members(sample)) for sample in samples)


def write_shard(url: str, name: str, samples: Iterable[EncodedSample]) -> WrittenShard:
    """Publishes one shard and then its table below a data set's URL; both whole or not at all.

    A shard is finished when its table is there.
    """
    return publish_shard(url, name, shard_bytes(samples))


def publish_shard(url: str, name: str, data: bytes) -> WrittenShard:
    """As `write_shard`, of a tar that is there already."""
    written, table = index_tar(name, data)
    storage.publish(storage.join(url, name), data)
    storage.publish(storage.join(url, table_name(name)), table.to_bytes())
    return written


def write_index(
    url: str,
    shards: Iterable[WrittenShard],
    *,
    class_names: tuple[str, ...] | None = None,
    about: Mapping[str, Any] | None = None,
) -> DataIndex:
    """Publishes the index of finished shards, in the given order; with it, the data set exists."""
    index = make_index(url, shards, class_names=class_names, about=about)
    save_index(index)
    return index


def make_index(
    url: str,
    shards: Iterable[WrittenShard],
    *,
    class_names: tuple[str, ...] | None = None,
    about: Mapping[str, Any] | None = None,
    at: str | None = None,
) -> DataIndex:
    """As `write_index`, not published. Raises DataError where the shards don't go together."""
    shards = list(shards)
    schema = merge_schema([s.summary for s in shards if s.info.samples], class_names)
    lying = sum(s.summary.notes[PHOTO][0] for s in shards if PHOTO in s.summary.notes)
    about = {**(about or {}), **({LYING: lying} if lying else {})}
    return DataIndex(url, tuple(s.info for s in shards), schema, about, at)


def index_tar(
    name: str, data: bytes, reading: Reading = OWN, labels: Mapping[str, object] | None = None
) -> tuple[WrittenShard, SampleTable]:
    """The table of a shard's bytes, and what the index says of it. Raises ShardError, DataError, ConfigError.

    labels: {path or key: class}, of the reading's file. Where classes have names, a label in the table is the place of
    its name in the summary's `names`.
    """
    found = tar.contents(data, name, reading.split)
    notes = {what: list(paths) for what, paths in found.left_out.items()}
    rows = np.zeros(len(found.samples), ROW)
    keys: list[bytes] = []
    classes: list[int | str | None] = []
    seen = _Seen(notes)
    end = 0
    for number, members in enumerate(found.samples):
        key = members[0].key
        keys.append(key.encode())
        end += len(keys[-1])
        image, files = image_of(members, reading, name), {member.extension: member for member in members}
        classes.append(class_of(data, files, reading, labels, name))
        start, size = (image.offset, image.size) if image else (members[0].offset, 0)
        if size >= 2**32:
            raise DataError(f"{name}: the image of sample {key} has {size} bytes; at most {2**32 - 1} can be")
        content = data[start : start + size]
        rows[number] = (start, size, zlib.crc32(content), NO_LABEL, end)
        if image is None:
            notes.setdefault(IMAGELESS, []).append(f"{key} ({shown_members(members)})")
        else:
            seen.add(key, content)
            read = {image.extension} | (set() if labels is not None else {reading.label_member[0]})
            notes.setdefault(OTHER, []).extend(f"{key}.{extension}" for extension in files if extension not in read)
    _refuse_twice(keys, name)
    names = names_among(classes, name)
    numbers = {class_name: number for number, class_name in enumerate(names)}
    rows["label"] = [_number(value, numbers) for value in classes]
    table = SampleTable(rows, b"".join(keys))
    table_data = table.to_bytes()
    info = ShardInfo(name, len(data), len(rows), content_hash(data), len(table_data), content_hash(table_data))
    shown = {what: (len(paths), paths[:PATHS_SHOWN]) for what, paths in notes.items() if paths}
    classes_up_to = int(rows["label"].max(initial=NO_LABEL)) + 1
    return WrittenShard(info, ShardSummary(dict(seen.formats), *seen.span, classes_up_to, shown, tuple(names))), table


class _Seen:
    """What the heads of images say: formats, sizes; notes get what can't be read, and what doesn't stand upright."""

    def __init__(self, notes: dict[str, list[str]]) -> None:
        self._notes, self._sizes = notes, list[tuple[int, int]]()
        self.formats: Counter[str] = Counter()

    def add(self, key: str, content: bytes) -> None:
        try:
            form, height, width = decode.describe(content)
        except decode.BadSampleError as error:  # the loader counts it by cause, ddpm-shards verify names all
            self._notes.setdefault(UNREADABLE, []).append(f"{key}: {error}")
            return
        self._sizes.append((height, width))
        self.formats[form] += 1
        if upright.orientation(content) != upright.UPRIGHT:
            self._notes.setdefault(PHOTO, []).append(key)

    @property
    def span(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Smallest and largest (height, width), each by itself; zeros without images."""
        heights, widths = zip(*self._sizes, strict=True) if self._sizes else ((0,), (0,))
        return (min(heights), min(widths)), (max(heights), max(widths))


def _refuse_twice(keys: Sequence[bytes], name: str) -> None:
    if len(set(keys)) < len(keys):
        key = next(key for key, count in Counter(keys).items() if count > 1).decode()
        raise DataError(
            f"{name}: the key {key} stands twice, with other files between; keys must be unique, and the files of "
            f"a sample lie side by side: `tar --sort=name` writes them so"
        )


def _number(value: int | str | None, numbers: Mapping[str, int]) -> int:
    return NO_LABEL if value is None else numbers[value] if isinstance(value, str) else value


def merge_schema(parts: Iterable[ShardSummary], class_names: tuple[str, ...] | None = None) -> Schema:
    """The schema of a set from those of its shards."""
    parts = list(parts)
    formats: Counter[str] = Counter()
    for part in parts:
        formats.update(part.formats)
    sized = [part for part in parts if part.max_size != (0, 0)]
    lows = (min((p.min_size[0] for p in sized), default=0), min((p.min_size[1] for p in sized), default=0))
    highs = (max((p.max_size[0] for p in sized), default=0), max((p.max_size[1] for p in sized), default=0))
    classes = max((part.classes for part in parts), default=0)
    if classes and any(not part.classes for part in parts):
        raise DataError(f"some shards have labels, others don't; {REMEDY}")
    if class_names:
        classes = max(classes, len(class_names))
    return Schema(dict(formats), lows, highs, classes or None, class_names)


def _members(sample: EncodedSample) -> dict[str, bytes]:
    if "." in sample.key.rpartition("/")[2] or not sample.key:
        raise DataError(f"key {sample.key!r}: WebDataset would end it at the dot")
    files = {sample.extension: sample.image}
    if sample.label is not None:
        files["cls"] = str(sample.label).encode()
    return files
