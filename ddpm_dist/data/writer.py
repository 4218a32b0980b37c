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
IMAGELESS, UNREADABLE, LYING = "imageless sample", "unreadable image", "photo"
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
    return DataIndex(url, tuple(s.info for s in shards), schema, about or {}, at)


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
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    end = 0
    seen: set[str] = set()
    for number, members in enumerate(found.samples):
        key = members[0].key
        if key in seen:
            raise DataError(
                f"{name}: the key {key} stands twice, with other files between; keys must be unique, and the files of "
                f"a sample lie side by side: `tar --sort=name` writes them so"
            )
        seen.add(key)
        keys.append(key.encode())
        end += len(keys[-1])
        image = image_of(members, reading, name)
        if image is None:
            notes.setdefault(IMAGELESS, []).append(f"{key} ({shown_members(members)})")
        classes.append(class_of(data, {member.extension: member for member in members}, reading, labels, name))
        start, size = (image.offset, image.size) if image else (members[0].offset, 0)
        if size >= 2**32:
            raise DataError(f"{name}: the image of sample {key} has {size} bytes; at most {2**32 - 1} can be")
        content = data[start : start + size]
        rows[number] = (start, size, zlib.crc32(content), NO_LABEL, end)
        try:
            form, height, width = decode.describe(content)
            sizes.append((height, width))
            formats[form] += 1
            if upright.orientation(content) != upright.UPRIGHT:
                notes.setdefault(LYING, []).append(key)
        except decode.BadSampleError as error:  # the loader counts it by cause, ddpm-shards verify names all
            if image is not None:
                notes.setdefault(UNREADABLE, []).append(f"{key}: {error}")
    names = names_among(classes, name)
    numbers = {class_name: number for number, class_name in enumerate(names)}
    rows["label"] = [_number(value, numbers) for value in classes]
    table = SampleTable(rows, b"".join(keys))
    table_data = table.to_bytes()
    info = ShardInfo(name, len(data), len(rows), content_hash(data), len(table_data), content_hash(table_data))
    lows = (min((h for h, _ in sizes), default=0), min((w for _, w in sizes), default=0))
    highs = (max((h for h, _ in sizes), default=0), max((w for _, w in sizes), default=0))
    shown = {what: (len(paths), paths[:PATHS_SHOWN]) for what, paths in notes.items()}
    largest = int(rows["label"].max(initial=NO_LABEL))
    return WrittenShard(info, ShardSummary(dict(formats), lows, highs, largest + 1, shown, tuple(names))), table


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
