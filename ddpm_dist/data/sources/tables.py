"""Images in containers of records: Parquet as Hugging Face lays it out, LSUN's LMDB, data sets with an index."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ddpm_dist import storage
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.index import NO_LABEL, load_index
from ddpm_dist.data.sources.base import Item, existing, open_input
from ddpm_dist.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
GROUPS_KEPT = 2
LMDB_MAP_BYTES = 2**42


class Parquet:
    """Rows of Parquet files: an image column (bytes, or {bytes, path}) and perhaps a label column.

    A row is read with its whole row group, so shards take runs of rows.
    """

    def __init__(self, inputs: Sequence[str], labels: str | None) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError("parquet: pip install pyarrow, which reads it") from None
        paths = [file for path in inputs for file in _files_below(path, ".parquet")]
        if not paths:
            raise DataError(f"parquet: no .parquet file at {', '.join(inputs)}")
        try:
            self._files = [parquet.ParquetFile(open_input(path, "a Parquet file")) for path in paths]
        except arrow.ArrowException as error:
            raise DataError(f"{paths[0]}: not Parquet: {error}") from None
        columns = self._files[0].schema_arrow.names
        self._image = _column(columns, IMAGE_COLUMNS, paths[0])
        self._label = None if labels == "none" else next((name for name in LABEL_COLUMNS if name in columns), None)
        self._groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.metadata.num_row_groups)]
        self._starts = [0]
        for f, g in self._groups:
            self._starts.append(self._starts[-1] + self._files[f].metadata.row_group(g).num_rows)
        self.run = max(1, self._starts[-1] // max(1, len(self._groups)))
        self.class_names = self._names_in(self._files[0].schema_arrow.metadata or {})
        self.about = {"source": ", ".join(Path(path).name for path in paths[:3])}
        self._rows = lru_cache(maxsize=GROUPS_KEPT)(self._read_group)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Item:
        group = bisect_right(self._starts, i) - 1
        row = self._rows(group)[i - self._starts[group]]
        image = row[self._image]
        name = ""
        if isinstance(image, dict):
            name, image = Path(image.get("path") or "").name, image.get("bytes")
        label = row[self._label] if self._label else None
        return Item(name, image or b"", None if label is None else int(label))

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        f, g = self._groups[group]
        columns = [self._image, *([self._label] if self._label else [])]
        rows: list[dict[str, Any]] = self._files[f].read_row_group(g, columns=columns).to_pylist()
        return rows

    def _names_in(self, metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
        """Hugging Face's class names, where its metadata have them."""
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return tuple(features[self._label]["names"])
        except (KeyError, ValueError, TypeError):
            return None


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
        try:
            self._environment = lmdb.open(
                str(root), readonly=True, lock=False, readahead=False, subdir=root.is_dir(), map_size=LMDB_MAP_BYTES
            )
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                self._keys = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
        except lmdb.Error as error:
            raise DataError(f"{path}: not an LMDB: {error}") from None
        self.about = {"source": f"LSUN, {root.name}"}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Item:
        with self._environment.begin() as transaction:
            return Item(self._keys[i].decode("ascii", "replace"), transaction.get(self._keys[i]) or b"")


class Indexed:
    """A WebDataset that has an index (ddpm-shards index makes one): to resize, convert or shuffle it anew."""

    def __init__(self, url: str) -> None:
        index = load_index(url)
        self._reader = ShardReader(index)
        self._starts = [0]
        for shard in index.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self.run = 1
        self.class_names = index.schema.class_names
        self.about = {key: str(value) for key, value in index.about.items()}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Item:
        shard = bisect_right(self._starts, i) - 1
        sample = self._reader.sample(shard, i - self._starts[shard])
        return Item(sample.key, sample.image, None if sample.label == NO_LABEL else sample.label)


def _files_below(path: str, extension: str) -> list[str]:
    """The file itself, or the files of an extension below a folder, in order."""
    if path.endswith(extension):
        return [path]
    if "://" in path:
        return [storage.join(path, name) for name in storage.list_objects(path) if name.endswith(extension)]
    return sorted(str(file) for file in existing(path, f"a folder of {extension} files").rglob(f"*{extension}"))


def _column(columns: Sequence[str], wanted: Sequence[str], place: str) -> str:
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise DataError(f"{place}: columns {', '.join(columns)}; one called {' or '.join(wanted)} is wanted")
    return found
