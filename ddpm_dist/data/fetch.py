"""Verified bytes of a data set's shards: tables, ranges, single samples.

What comes back is what the index promises, or there is an error that names the shard. Bytes that differ
from their CRC-32 are asked for again, since a network can spoil them; if they stay different, the shard is
altered.
"""

import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data.index import DataIndex, SampleTable, load_table
from ddpm_dist.data.order import Extent
from ddpm_dist.errors import NotFoundError, ShardError, ShortReadError

CRC_ATTEMPTS = 4
TABLES_KEPT = 64


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in its shard, not yet decoded."""

    key: str
    image: bytes
    label: int
    """Class, or −1."""
    id: int
    """Number in the whole set, in the order of the index."""


class LoadedExtent:
    """Consecutive samples of one shard, in memory, verified."""

    def __init__(self, data: bytes, table: SampleTable, extent: Extent, first_byte: int, first_id: int) -> None:
        rows = table.rows[extent.first : extent.first + extent.count]
        self.data = data
        starts = rows["offset"].astype(np.int64) - first_byte
        self.starts: list[int] = starts.tolist()
        self.stops: list[int] = (starts + rows["size"]).tolist()
        self.labels: list[int] = rows["label"].tolist()
        self.crcs: list[int] = rows["crc32"].tolist()
        self.first_id = first_id
        key_start = int(table.rows["key_end"][extent.first - 1]) if extent.first else 0
        self.key_ends: list[int] = [key_start, *rows["key_end"].tolist()]
        self.keys = table.keys

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Sample:
        key = self.keys[self.key_ends[i] : self.key_ends[i + 1]].decode()
        return Sample(key, self.data[self.starts[i] : self.stops[i]], self.labels[i], self.first_id + i)

    def damaged(self) -> int | None:
        """The first sample whose bytes differ from their CRC-32."""
        view = memoryview(self.data)
        for i, (start, stop, crc) in enumerate(zip(self.starts, self.stops, self.crcs, strict=True)):
            if zlib.crc32(view[start:stop]) != crc:
                return i
        return None


class ShardReader:
    """Reads one data set; many threads may use it.

    first_id: number of the set's first sample among all sets of a mix.
    """

    def __init__(self, index: DataIndex, first_id: int = 0) -> None:
        self.index = index
        self.first_id = first_id
        self._first_ids = first_id + np.concatenate(([0], np.cumsum(index.counts)))
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()
        self._lock = threading.Lock()

    def bytes_of(self, extent: Extent) -> int:
        """About how many bytes an extent has: its share of the shard."""
        shard = self.index.shards[extent.shard]
        return shard.bytes * extent.count // shard.samples

    def load(self, extent: Extent) -> LoadedExtent:
        """One range read of consecutive samples; raises ShardError and storage's errors."""
        table = self._table(extent.shard)
        shard = self.index.shards[extent.shard]
        rows = table.rows[extent.first : extent.first + extent.count]
        first = int(rows["offset"][0])
        last = int((rows["offset"].astype(np.int64) + rows["size"]).max())
        damaged: int | None = 0
        for _ in range(CRC_ATTEMPTS):
            data = self._read(shard.name, first, last - first)
            loaded = LoadedExtent(data, table, extent, first, int(self._first_ids[extent.shard]) + extent.first)
            damaged = loaded.damaged()
            if damaged is None:
                return loaded
        place = storage.redact(storage.join(self.index.url, shard.name))
        assert damaged is not None
        raise ShardError(
            f"{place}: altered: sample {loaded[damaged].key} differs from its checksum in the index, also when read "
            f"{CRC_ATTEMPTS} times; restore the shard, or leave it out with data.exclude_shards"
        )

    def sample(self, shard: int, sample: int) -> Sample:
        """A single sample."""
        return self.load(Extent(shard, sample, 1))[0]

    def _read(self, name: str, start: int, length: int) -> bytes:
        if not length:
            return b""
        url = storage.join(self.index.url, name)
        try:
            return storage.read_range(url, start, length)
        except NotFoundError:
            raise ShardError(
                f"{storage.redact(url)}: missing, but in the index; restore it, or leave it out with "
                f"data.exclude_shards"
            ) from None
        except ShortReadError as error:
            raise ShardError(f"{error}: truncated; restore it, or leave it out with data.exclude_shards") from None

    def _table(self, shard: int) -> SampleTable:
        with self._lock:
            table = self._tables.get(shard)
            if table is not None:
                self._tables.move_to_end(shard)
                return table
        table = load_table(self.index.url, self.index.shards[shard])
        with self._lock:
            self._tables[shard] = table
            while len(self._tables) > TABLES_KEPT:
                self._tables.popitem(last=False)
        return table
