"""Images in containers of records: LSUN's LMDB, data sets with an index."""

import subprocess
import sys
from bisect import bisect_right
from pathlib import Path

from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.index import KEYS, LEFT_OUT, LYING, NO_LABEL, load_index
from ddpm_dist.data.sources.base import Item, existing, normal, reading
from ddpm_dist.errors import DataError

LMDB_MAP_BYTES = 2**42
LMDB_LIMIT_S = 3600.0

_PROBE = f"""
import os, sys, lmdb
env = lmdb.open(sys.argv[1], readonly=True, lock=False, readahead=False, subdir=False, map_size={LMDB_MAP_BYTES})
bytes_said, bytes_there = (env.info()["last_pgno"] + 1) * env.stat()["psize"], os.path.getsize(sys.argv[1])
if bytes_there < bytes_said:
    sys.exit(f"truncated: {{bytes_there}} bytes, {{bytes_said}} belong to it")
left = env.stat()["entries"]
with env.begin(buffers=True) as txn, txn.cursor() as cursor:
    for key, value in cursor.iternext():
        left -= 1
        bytes(key), bytes(value[:1]), bytes(value[-1:])
        if left < 0:
            break
if left:
    sys.exit("it has another number of entries than it says")
"""
"""Walks a whole LMDB as it will be read. The library trusts what lies on the disk: a damaged page kills its process."""


class Lsun:
    """LSUN's LMDB: one file of an image (WebP) under each key; no labels."""

    run = 1
    class_names: tuple[str, ...] | None = None

    def __init__(self, path: str) -> None:
        try:
            import lmdb
        except ImportError:
            raise DataError("lsun: pip install lmdb, which reads it") from None
        root = existing(path, "LSUN's LMDB folder (it holds data.mdb)")
        file = root / "data.mdb" if root.is_dir() else root
        if not file.is_file():
            raise DataError(f"{path}: holds no data.mdb; LSUN's LMDB folder is expected there")
        _probe(file, path)
        with reading(path, "an LMDB"):
            self._environment = lmdb.open(
                str(file), readonly=True, lock=False, readahead=False, subdir=False, map_size=LMDB_MAP_BYTES
            )
        self._sizes: list[int] = []
        self._keys: list[bytes] = []
        with (
            reading(path, "an LMDB"),
            self._environment.begin(buffers=True) as transaction,
            transaction.cursor() as cursor,
        ):
            for key, value in cursor.iternext():
                self._keys.append(bytes(key))
                self._sizes.append(len(value))
        self.notes: tuple[str, ...] = ("no labels",)
        self.about = {"source": f"LSUN, {root.name}"}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Item:
        with self._environment.begin() as transaction:
            return Item(self._keys[i].decode("ascii", "replace"), transaction.get(self._keys[i]) or b"")

    def fingerprint(self, i: int) -> bytes:
        return self._keys[i] + f"\0{self._sizes[i]}".encode()


def _probe(file: Path, path: str) -> None:
    command = [sys.executable, "-P", "-c", _PROBE, str(file)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LMDB_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{path}: walking it took more than {LMDB_LIMIT_S:.0f} s; it is damaged, or too slow") from None
    if done.returncode < 0:
        raise DataError(f"{path}: damaged: it leads the LMDB library astray (signal {-done.returncode})")
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise DataError(f"{path}: damaged, or not an LMDB: {reason[0]}")


class Indexed:
    """A WebDataset that has an index (ddpm-shards index makes one): to resize, convert or shuffle it anew.

    at: folder of its index, if it isn't with the shards.
    """

    def __init__(self, url: str, at: str | None = None) -> None:
        index = load_index(_as_url(url), at=None if at is None else _as_url(at))
        self._reader, self._content = ShardReader(index), index.content_id
        self._starts = [0]
        for shard in index.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self.run = 1
        self.class_names = index.schema.class_names
        self.notes: tuple[str, ...] = (f"{index.num_classes} classes" if index.num_classes else "no labels",)
        self.about = {key: str(value) for key, value in index.about.items() if key not in (LEFT_OUT, KEYS, LYING)}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Item:
        shard = bisect_right(self._starts, i) - 1
        sample = self._reader.sample(shard, i - self._starts[shard])
        return Item(sample.key, sample.image, None if sample.label == NO_LABEL else sample.label)

    def fingerprint(self, i: int) -> bytes:
        return f"{self._content} {i}".encode()


def _as_url(place: str) -> str:
    return place if "://" in place else f"file://{normal(place)}"
