"""Verified samples of a data set: tables, ranges of shards, single samples.

What comes back is what the index promises, or there is an error that names the shard. Bytes that differ
from their checksum are asked for again, since a network can spoil them; if they stay different, the object
is altered.
"""

import logging
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data.cache import DiskCache
from ddpm_dist.data.index import DataIndex, SampleTable, ShardInfo, content_hash, table_name
from ddpm_dist.data.order import Extent
from ddpm_dist.data.ranges import RangeReader
from ddpm_dist.errors import NotFoundError, ShardError, ShortReadError

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Reads of the same bytes before a wrong checksum is the store's and not the network's."""
TABLES_KEPT_BYTES = 2**24
REMEDY = "restore it, or leave it out with data.exclude_shards"


class Sample(NamedTuple):
    """A sample as it lies in its shard, not yet decoded."""

    key: str
    image: bytes
    label: int
    """Class, or −1."""
    id: int
    """Number among all sets of a mix, in the order of their indexes."""


class LoadedExtent:
    """Consecutive samples of one shard, in memory."""

    def __init__(
        self, data: bytes | bytearray, first_byte: int, table: SampleTable, extent: Extent, first_id: int
    ) -> None:
        rows = table.rows[extent.first : extent.first + extent.count]
        starts = rows["offset"].astype(np.int64) - first_byte
        self._data, self._first_id, self._keys = memoryview(data), first_id, table.keys
        self._starts: list[int] = starts.tolist()
        self._stops: list[int] = (starts + rows["size"]).tolist()
        self._labels: list[int] = rows["label"].tolist()
        self._crcs: list[int] = rows["crc32"].tolist()
        key_start = int(table.rows["key_end"][extent.first - 1]) if extent.first else 0
        self._key_ends: list[int] = [key_start, *rows["key_end"].tolist()]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Sample:
        key = self._keys[self._key_ends[i] : self._key_ends[i + 1]].decode()
        image = bytes(self._data[self._starts[i] : self._stops[i]])
        return Sample(key, image, self._labels[i], self._first_id + i)

    def damaged(self) -> int | None:
        """The first sample whose bytes differ from their CRC-32."""
        for i, (start, stop, crc) in enumerate(zip(self._starts, self._stops, self._crcs, strict=True)):
            if zlib.crc32(self._data[start:stop]) != crc:
                return i
        return None


class ShardReader:
    """Reads one data set; many threads may use it.

    first_id: number of the set's first sample among all sets of a mix.
    """

    def __init__(self, index: DataIndex, first_id: int = 0, cache: DiskCache | None = None) -> None:
        self.index, self.first_id, self.cache = index, first_id, cache
        self._first_ids = first_id + np.concatenate(([0], np.cumsum(index.counts)))
        self._ranges = RangeReader()
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()
        self._table_bytes = 0
        self._lock = threading.Lock()

    def bytes_of(self, extent: Extent) -> int:
        """About how many bytes an extent has: its share of the shard."""
        shard = self.index.shards[extent.shard]
        return shard.bytes * extent.count // shard.samples

    def load(self, extent: Extent) -> LoadedExtent:
        """Consecutive samples by one range read; raises ShardError and storage's errors."""
        table, shard = self.table(extent.shard), self.index.shards[extent.shard]
        rows = table.rows[extent.first : extent.first + extent.count]
        first = int(rows["offset"].min())
        last = int((rows["offset"].astype(np.int64) + rows["size"]).max())
        first_id = int(self._first_ids[extent.shard]) + extent.first

        def attempt() -> tuple[LoadedExtent, str | None]:
            data = self._read(shard, first, last - first)
            loaded = LoadedExtent(data, first, table, extent, first_id)
            damaged = loaded.damaged()
            return loaded, None if damaged is None else f"sample {loaded[damaged].key} differs from its checksum"

        return self._until_right(shard.name, attempt)

    def sample(self, shard: int, sample: int) -> Sample:
        """A single sample."""
        return self.load(Extent(shard, sample, 1))[0]

    def table(self, shard: int) -> SampleTable:
        """Where the samples of a shard lie; the last ones asked for are kept."""
        with self._lock:
            table = self._tables.get(shard)
            if table is not None:
                self._tables.move_to_end(shard)
                return table
        info = self.index.shards[shard]
        table = self._load_table(info)
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = table
                self._table_bytes += info.table_bytes
            while self._table_bytes > TABLES_KEPT_BYTES and len(self._tables) > 1:
                dropped, _ = self._tables.popitem(last=False)
                self._table_bytes -= self.index.shards[dropped].table_bytes
        return table

    def _load_table(self, shard: ShardInfo) -> SampleTable:
        name = table_name(shard.name)

        def attempt() -> tuple[bytes | bytearray, str | None]:
            data = self._fetch(name, shard.table_bytes, 0, shard.table_bytes, self.index.home)
            return data, None if content_hash(data) == shard.table_hash else "its hash is not the one in the index"

        table = SampleTable.from_bytes(bytes(self._until_right(name, attempt)), name)
        if len(table.rows) != shard.samples:
            raise ShardError(f"{self._place(name)}: {len(table.rows)} samples, the index says {shard.samples}")
        return table

    def _read(self, shard: ShardInfo, start: int, length: int) -> bytes | bytearray:
        if not length:
            return b""
        if self.cache is None:
            return self._fetch(shard.name, shard.bytes, start, length)
        return self.cache.read(shard, start, length, lambda s, n: self._fetch(shard.name, shard.bytes, s, n))

    def _fetch(self, name: str, expected: int, start: int, length: int, folder: str | None = None) -> bytes | bytearray:
        """A range of an object that should have `expected` bytes; folder: its URL, if it isn't that of the shards."""
        try:
            data, held = self._ranges.read(storage.join(folder or self.index.url, name), start, length)
        except NotFoundError:
            raise ShardError(f"{self._place(name)}: missing, but in the index; {REMEDY}") from None
        except ShortReadError as error:
            raise ShardError(f"{error}; the index says {expected}: truncated; {REMEDY}") from None
        if held is not None and held != expected:
            what = "truncated" if held < expected else "altered"
            raise ShardError(f"{self._place(name)}: {what}: {held} bytes, the index says {expected}; {REMEDY}")
        return data

    def _until_right(self, name: str, attempt: Callable[[], tuple[T, str | None]]) -> T:
        """What `attempt` reads, as soon as it says nothing against it."""
        for number in range(ATTEMPTS):
            found, wrong = attempt()
            if wrong is None:
                return found
            if number + 1 < ATTEMPTS:
                log.warning("data: %s: %s; read again", self._place(name), wrong)
        raise ShardError(f"{self._place(name)}: altered: {wrong}, in {ATTEMPTS} reads; {REMEDY}")

    def _place(self, name: str) -> str:
        return storage.redact(storage.join(self.index.url, name))
