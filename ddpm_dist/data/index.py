"""The index of a data set: its shards with size, sample count and hash, its schema, its content id.

`index.json` lists the shards. Beside it, `index/<shard>.samples` is the table of a shard: where each
sample's image lies, its CRC-32, its label and its key. So a reader starts anywhere in a shard without
parsing tar headers, and sees a flipped byte although it reads only a part of the shard. The chain of
trust is closed: content id ← hashes of shards and tables ← CRC of each image.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_dist import storage
from ddpm_dist.data.plans import plan_at
from ddpm_dist.data.ranges import RangeReader
from ddpm_dist.data.strict import LFS_POINTER
from ddpm_dist.errors import ConfigError, DataError, NotFoundError, ShardError, ShortReadError

INDEX_NAME = "index.json"
TABLE_FOLDER = "index"
INDEX_FORMAT = "ddpm_dist data index 1"
TABLE_MAGIC = b"ddpm_dist samples 1\n"
NO_LABEL = -1
LEFT_OUT, KEYS, LYING = "left_out", "keys", "photos_not_upright"
"""Keys of an index's `about`: {shard: why index_shards left it out}; where keys end, if not at the first dot; number of
images that aren't upright by their EXIF orientation."""
MAX_SHARD_BYTES = 2**40

ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i4"), ("key_end", "<u4")])
"""A sample in a table: first byte of its image in the shard, the image's bytes and CRC-32, class, end of its key."""


def content_hash(data: bytes | bytearray | memoryview) -> str:
    """BLAKE2b-128 of bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ShardInfo:
    """What the index knows of a shard."""

    name: str
    """Path below the data set's URL."""
    bytes: int
    samples: int
    hash: str
    """BLAKE2b-128 of the whole object."""
    table_bytes: int
    table_hash: str
    """BLAKE2b-128 of its table."""


@dataclass(frozen=True)
class SampleTable:
    """Where the samples of one shard lie."""

    rows: NDArray[Any]
    """[n] of ROW."""
    keys: bytes
    """All keys in UTF-8, without separators."""

    def key(self, sample: int) -> str:
        start = int(self.rows["key_end"][sample - 1]) if sample else 0
        return self.keys[start : int(self.rows["key_end"][sample])].decode()

    def to_bytes(self) -> bytes:
        return b"".join((TABLE_MAGIC, len(self.rows).to_bytes(8, "little"), self.rows.tobytes(), self.keys))

    @staticmethod
    def from_bytes(data: bytes, name: str) -> "SampleTable":
        """Reads `to_bytes()`; ShardError if it is something else."""
        start = len(TABLE_MAGIC) + 8
        count = int.from_bytes(data[len(TABLE_MAGIC) : start], "little")
        if not data.startswith(TABLE_MAGIC) or len(data) < start + count * ROW.itemsize:
            raise ShardError(f"{name}: not a table of samples; make it again with ddpm-shards index")
        return SampleTable(np.frombuffer(data, ROW, count, start), data[start + count * ROW.itemsize :])


@dataclass(frozen=True)
class Schema:
    """What the samples of a set look like."""

    formats: Mapping[str, int] = field(default_factory=dict)
    """Number of images by format: {"png": 1797}."""
    min_size: tuple[int, int] = (0, 0)
    max_size: tuple[int, int] = (0, 0)
    """Smallest and largest (height, width) in pixels."""
    num_classes: int | None = None
    """Labels are 0..num_classes−1; none if samples have no label."""
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DataIndex:
    """A data set: the index of its shards."""

    url: str
    shards: tuple[ShardInfo, ...]
    schema: Schema
    about: Mapping[str, Any] = field(default_factory=dict)
    """Free notes, such as source and licence; not part of the content id."""
    at: str | None = None
    """Where the index and its tables lie; None: with the shards."""

    @property
    def home(self) -> str:
        """URL of the folder with the index and its tables."""
        return self.at or self.url

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Of all shards, as they lie in the store."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def bytes_per_sample(self) -> float:
        """Mean bytes in the store for each sample, its tar headers among them."""
        return self.num_bytes / self.num_samples

    @property
    def num_classes(self) -> int | None:
        """Classes 0 … n − 1 of the labels; None: the set has no labels."""
        return self.schema.num_classes

    @property
    def counts(self) -> NDArray[np.int64]:
        """[shards] samples of each."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def content_id(self) -> str:
        """Changes with any byte of any shard, with their order, and with shards left out."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.samples}\0{shard.hash}\0{shard.table_hash}\n".encode())
        return digest.hexdigest()

    def without(self, names: Iterable[str]) -> "DataIndex":
        """The set without some shards, under a new content id; ConfigError for a name that isn't there."""
        left_out = set(names)
        unknown = left_out - {shard.name for shard in self.shards}
        if unknown:
            raise ConfigError(f"data.exclude_shards: {sorted(unknown)[0]!r} is not a shard of {self.url}")
        shards = tuple(shard for shard in self.shards if shard.name not in left_out)
        return replace(self, shards=shards)


def table_name(shard: str) -> str:
    """Path of a shard's table below the data set's URL."""
    return f"{TABLE_FOLDER}/{shard}.samples"


def save_index(index: DataIndex) -> None:
    """Publishes `index.json`; the same index gives the same bytes. One line a shard, for people and diffs."""
    storage.publish(storage.join(index.home, INDEX_NAME), index_bytes(index))


def index_bytes(index: DataIndex) -> bytes:
    schema = index.schema
    head = {
        "format": INDEX_FORMAT,
        "content_id": index.content_id,
        "num_samples": index.num_samples,
        "num_bytes": index.num_bytes,
        "schema": {
            "formats": dict(sorted(schema.formats.items())),
            "min_size": list(schema.min_size),
            "max_size": list(schema.max_size),
            "num_classes": schema.num_classes,
            "class_names": list(schema.class_names) if schema.class_names else None,
        },
        "about": dict(index.about),
    }
    rows = ",\n".join(
        json.dumps([s.name, s.bytes, s.samples, s.hash, s.table_bytes, s.table_hash]) for s in index.shards
    )
    return (json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n' + rows + "\n]\n}\n").encode()


def load_index(url: str, name: str | None = None, at: str | None = None) -> DataIndex:
    """The index of the data set at a URL; NotFoundError, DataError say what to do where there is none.

    name: the key or argument that holds the URL, for the message. at: folder of the index, if it isn't with the shards.
    """
    home = at or url
    place = storage.redact(storage.join(home, INDEX_NAME))
    try:
        with closing(RangeReader()) as reader:
            data = reader.read_whole(storage.join(home, INDEX_NAME))
    except NotFoundError as error:
        if not _is_http(home):
            storage.check_access(home, name)
        plan = plan_at(url)
        if plan:
            raise DataError(
                f"{name or 'the data set'}: {place} isn't there yet: make_shards ({plan.source}) began this data set "
                f"and didn't finish it; the same make_shards command goes on with it"
            ) from None
        key = f"{name}: " if name else ""
        raise NotFoundError(
            f"{key}{place}: {str(error).rpartition(': ')[2]}; ddpm-shards make writes a data set, "
            f"ddpm-shards index indexes one that exists"
        ) from None
    try:
        values = json.loads(data)
        if values["format"] != INDEX_FORMAT:
            raise DataError(f"{place}: format {values['format']!r}, this version reads {INDEX_FORMAT!r}")
        index = DataIndex(url, tuple(ShardInfo(*row) for row in values["shards"]), _schema(values["schema"]))
        content_id, about = values["content_id"], dict(values["about"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        pointer = "a pointer of Git LFS; `git lfs pull` brings the file" if data.startswith(LFS_POINTER) else ""
        raise DataError(f"{place}: not an index of a data set ({pointer or error}); make it again") from None
    if index.content_id != content_id:
        raise DataError(f"{place}: altered: its content is {index.content_id}, it says {content_id}")
    if not index.num_samples:
        raise DataError(f"{place}: the data set is empty; ddpm-shards make writes one")
    if _is_http(url):
        _check_ranges(storage.join(url, index.shards[0].name))
    return DataIndex(url, index.shards, index.schema, about, at)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _check_ranges(url: str) -> None:
    """DataError for a server that sends whole objects where a part is asked for: each block would fetch a shard."""
    try:
        storage.read_range(url, 0, 1, patience_s=0)
    except ShortReadError as error:
        raise DataError(
            f"{error}: the server knows no byte ranges, without which a set can't be read; copy it to a store that "
            f"does, such as a folder (file:///FOLDER)"
        ) from None


def _schema(values: Mapping[str, Any]) -> Schema:
    names = values["class_names"]
    return Schema(
        values["formats"],
        tuple(values["min_size"]),
        tuple(values["max_size"]),
        values["num_classes"],
        tuple(names) if names else None,
    )
