"""Writes data sets: deterministic WebDataset shards, each published whole, and the index at the end."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data import decode, tar
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
from ddpm_dist.errors import DataError

PATHS_SHOWN = 3


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
    left_out: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    """{what it is: (its number, some paths)} of files of the tar that belong to no sample."""


@dataclass(frozen=True)
class WrittenShard:
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
) -> DataIndex:
    """As `write_index`, not published. Raises DataError where the shards don't go together."""
    shards = list(shards)
    schema = merge_schema([s.summary for s in shards if s.info.samples], class_names)
    return DataIndex(url, tuple(s.info for s in shards), schema, about or {})


def index_tar(name: str, data: bytes, label_field: str = "cls") -> tuple[WrittenShard, SampleTable]:
    """The table of a shard's bytes, and what the index says of it. Raises ShardError, DataError.

    label_field: extension of the member that holds the class as decimal text, or `json:FIELD` for a field of the
    .json member.
    """
    found = tar.contents(data, name)
    samples = found.samples
    rows = np.zeros(len(samples), ROW)
    keys: list[bytes] = []
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    end = 0
    seen: set[str] = set()
    for number, members in enumerate(samples):
        key = members[0].key
        if key in seen:
            raise DataError(
                f"{name}: the key {key} stands twice, with other files between; keys must be unique, and the files of "
                f"a sample lie side by side: `tar --sort=name` writes them so"
            )
        seen.add(key)
        keys.append(key.encode())
        end += len(keys[-1])
        files = {member.extension: member for member in members}
        image = next((files[e] for e in tar.IMAGE_EXTENSIONS if e in files), None)
        label = _label(data, files, label_field, f"{name}: {key}")
        start, size = (image.offset, image.size) if image else (members[0].offset, 0)
        content = data[start : start + size]
        rows[number] = (start, size, zlib.crc32(content), label, end)
        try:
            form, height, width = decode.describe(content)
            sizes.append((height, width))
            formats[form] += 1
        except decode.BadSampleError:
            pass  # the loader counts it by cause, ddpm-shards verify names it
    table = SampleTable(rows, b"".join(keys))
    table_data = table.to_bytes()
    info = ShardInfo(name, len(data), len(samples), content_hash(data), len(table_data), content_hash(table_data))
    lows = (min((h for h, _ in sizes), default=0), min((w for _, w in sizes), default=0))
    highs = (max((h for h, _ in sizes), default=0), max((w for _, w in sizes), default=0))
    left_out = {what: (len(paths), paths[:PATHS_SHOWN]) for what, paths in found.left_out.items()}
    classes = int(rows["label"].max(initial=NO_LABEL)) + 1
    if classes and int(rows["label"].min()) == NO_LABEL:
        raise DataError(f"{name}: some samples have a label ({label_field}), others don't")
    return WrittenShard(info, ShardSummary(dict(formats), lows, highs, classes, left_out)), table


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
        raise DataError("some shards have labels, others don't")
    if class_names:
        classes = max(classes, len(class_names))
    return Schema(dict(formats), lows, highs, classes or None, class_names)


def class_number(value: Any) -> int | None:
    """A class 0…2³¹−1 that is written as decimal text or is a whole JSON number; None for all else, such as 3.7."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        found = re.fullmatch(r"\s*\+?([0-9]{1,20})(\.0*)?\s*", value)
        value = int(found[1]) if found else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
        return value
    return None


def _members(sample: EncodedSample) -> dict[str, bytes]:
    if "." in sample.key.rpartition("/")[2] or not sample.key:
        raise DataError(f"key {sample.key!r}: WebDataset would end it at the dot")
    files = {sample.extension: sample.image}
    if sample.label is not None:
        files["cls"] = str(sample.label).encode()
    return files


def _label(data: bytes, files: Mapping[str, tar.Member], label_field: str, place: str) -> int:
    extension, _, json_field = label_field.partition(":")
    member = files.get(extension)
    if member is None:
        return NO_LABEL
    value: Any = data[member.offset : member.offset + member.size]
    if json_field:
        try:
            fields = dict(json.loads(value))
        except (ValueError, TypeError, RecursionError):
            raise DataError(f"{place}.json: {value[:40]!r} is not a JSON object") from None
        if json_field not in fields:
            raise DataError(f"{place}.json: no field {json_field!r}; it has {', '.join(fields) or 'none'}")
        value = fields[json_field]
    label = class_number(value)
    if label is not None:
        return label
    raise DataError(f"{place}: its label ({label_field}) is {value!r:.40}; a class number (0, 1, …) is wanted")
