"""Images in Parquet files, as Hugging Face lays them out."""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm_dist import storage
from ddpm_dist.data.sources import splits
from ddpm_dist.data.sources.base import Item, existing, files_below, local, open_input, reading
from ddpm_dist.data.sources.labels import NONE, describe_classes, number_classes
from ddpm_dist.data.sources.layout import Choice, is_leftover
from ddpm_dist.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
GROUPS_KEPT = 2
FILES_KEPT_OPEN = 16


class Parquet:
    """Rows of Parquet files: an image column (bytes, or {bytes, path}) and perhaps a label column.

    A row is read with its whole row group, so shards take runs of rows.
    """

    def __init__(self, inputs: Sequence[str], choice: Choice, images: str | None = None) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise DataError("parquet: pip install pyarrow, which reads it") from None
        notes: list[str] = []
        found = [pair for place in inputs for pair in _files_at(place, choice, notes)]
        self._names, self._paths = [name for name, _ in found], [path for _, path in found]
        if not found:
            said = f" ({'; '.join(notes)})" if notes else ""
            raise DataError(f"parquet: no .parquet file at {', '.join(inputs) or 'no INPUT'}{said}")
        if twice := [path for path, count in Counter(self._paths).items() if count > 1]:
            raise DataError(f"parquet: {twice[0]} is named twice")
        self._open = lru_cache(maxsize=FILES_KEPT_OPEN)(_open)
        self._rows = lru_cache(maxsize=GROUPS_KEPT)(self._read_group)
        self._columns(choice.labels, images)
        self._scan()
        self._labels, self.class_names, said = self._number(choice.sparse)
        self.run = max(1, len(self) // max(1, len(self._groups)))
        self.notes = tuple(note for note in (*notes, said, self._others) if note)
        self.about = {"source": ", ".join(Path(path).name for path in self._paths[:3])}

    def _columns(self, labels: str | None, images: str | None) -> None:
        """Chooses the columns by the first file."""
        path, schema = self._paths[0], self._open(self._paths[0]).schema_arrow
        described = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
        self._image = _one_of(schema.names, images, IMAGE_COLUMNS, "--images", f"{path}: columns {described}")
        if self._image is None:
            raise DataError(f"{path}: columns {described}; --images NAME says which one holds the images")
        if not _holds_images(schema.field(self._image).type):
            raise DataError(
                f"{path}: column {self._image} is {_short(schema.field(self._image).type)}; images as bytes, or as "
                f"{{bytes, path}}, are wanted; there are {described}"
            )
        asked = None if labels == NONE else labels
        self._label = None
        if labels != NONE:
            self._label = _one_of(schema.names, asked, LABEL_COLUMNS, "--labels", f"{path}: columns {described}")
        others = [name for name in schema.names if name not in (self._image, self._label)]
        self._others = f"left out: columns {', '.join(others[:8])}" if others else None

    def _scan(self) -> None:
        """Row groups, stamps and labels of all files; each is opened for that alone, so there may be any number."""
        self._groups: list[tuple[int, int]] = []
        self._starts, self._stamps = [0], []
        self._values: list[object] = []
        self._known_names: tuple[str, ...] | None = None
        for f, path in enumerate(self._paths):
            file = self._open(path)
            for column in filter(None, (self._image, self._label)):
                if column not in file.schema_arrow.names:
                    raise DataError(
                        f"{path}: no column {column}, which {self._paths[0]} has; leave the file out (--exclude)"
                        f"{', or the labels (--labels none)' if column == self._label else ''}"
                    )
            names = _names_in(file.schema_arrow.metadata or {}, self._label)
            if f and names != self._known_names:
                raise DataError(f"{path}: its class names differ from those of {self._paths[0]}")
            self._known_names = names
            with reading(path, "Parquet"):
                groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
                for g, group in enumerate(groups):
                    self._groups.append((f, g))
                    self._starts.append(self._starts[-1] + group.num_rows)
                    self._stamps.append(_stamp(self._names[f], group.to_dict()))
                if self._label:
                    values = file.read(columns=[self._label]).column(0).to_pylist()
                    if len(values) != file.metadata.num_rows:
                        raise DataError(f"{path}: {len(values)} labels for {file.metadata.num_rows} rows")
                    self._values += values

    def _number(self, sparse: str | None) -> tuple[list[int] | None, tuple[str, ...] | None, str]:
        if self._label is None:
            return None, None, "no labels"
        sparse = "keep" if self._known_names else sparse  # Hugging Face's ClassLabel says how many there are
        labels, names = number_classes(self._values, lambda i: f"{self._where(i)}: column {self._label}", sparse)
        self._values = []
        names = names or self._known_names
        if names and labels and max(labels) >= len(names):
            i = labels.index(max(labels))
            raise DataError(f"{self._where(i)}: class {labels[i]}, but {len(names)} class names")
        return labels, names, f"{describe_classes(labels or [], names)} (column {self._label})"

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Item:
        group = bisect_right(self._starts, i) - 1
        image: Any = self._rows(group)[i - self._starts[group]]
        name = ""
        if isinstance(image, dict):
            path, image = image.get("path"), image.get("bytes")
            name = PurePosixPath(path or "").name
            if image is None and path:
                raise DataError(f"{self._where(i)}: only the path of an image ({path}), not its bytes; use `folder`")
        return Item(name, image or b"", None if self._labels is None else self._labels[i])

    def fingerprint(self, i: int) -> bytes:
        group = bisect_right(self._starts, i) - 1
        label = None if self._labels is None else self._labels[i]
        return f"{self._stamps[group]} {i - self._starts[group]} {label}".encode()

    def _where(self, i: int) -> str:
        group = bisect_right(self._starts, i) - 1
        file = self._groups[group][0]
        first = next(start for start, (f, _) in zip(self._starts, self._groups, strict=False) if f == file)
        return f"{self._paths[file]}: row {i - first}"

    def _read_group(self, group: int) -> list[Any]:
        f, g = self._groups[group]
        with reading(f"{self._paths[f]}: row group {g}", "whole"):
            column = self._open(self._paths[f]).read_row_group(g, columns=[self._image]).column(0)
            rows: list[Any] = column.to_pylist()
            if len(rows) != self._starts[group + 1] - self._starts[group]:
                raise DataError(f"{self._paths[f]}: row group {g} has {len(rows)} rows, its head says otherwise")
            return rows


def _open(path: str) -> Any:
    import pyarrow.parquet as parquet

    with reading(path, "Parquet"):
        return parquet.ParquetFile(open_input(path, "a Parquet file"))


def _files_at(place: str, choice: Choice, notes: list[str]) -> list[tuple[str, str]]:
    """(path below the input, path) of the files of one INPUT, of one part; `notes` gets what is to be said."""
    if place.lower().endswith(".parquet"):
        return [(PurePosixPath(place).name, place)]
    if "://" in local(place):
        every = {name: storage.join(place, name) for name in storage.list_objects(place)}
    else:
        root = existing(place, "a folder of .parquet files")
        if root.is_file():
            return [(root.name, place)]
        every = {name: str(root / name) for name, _ in files_below(root, is_parquet, notes)}
    names = sorted(filter(is_parquet, every), key=every.__getitem__)
    taken = [name for name in names if choice.takes(name)]
    kinds = {name: splits.part_of(name) for name in taken}
    if taken and (len(set(kinds.values())) > 1 or choice.split is not None):
        exact = {name for name in taken if choice.split in PurePosixPath(name).parts}
        chosen = exact or splits.choose(kinds, choice.split, place)
        taken = [name for name in taken if name in chosen]
    if len(taken) < len(names):
        notes.append(f"{len(taken)} of {len(names)} .parquet files at {place}")
    return [(name, every[name]) for name in taken]


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and not is_leftover(name)


def _one_of(columns: Sequence[str], asked: str | None, known: Sequence[str], option: str, place: str) -> str | None:
    """The column that is asked for, or the one with a known name; DataError for two, or for none that is asked for."""
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{option} {asked}: {place}")
        return asked
    found = [name for name in known if name in columns]
    if len(found) > 1:
        raise DataError(f"{place}: {option} {' or '.join(found)}?")
    return found[0] if found else None


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _stamp(name: str, group: Mapping[str, Any]) -> str:
    """Changes with what the head of a row group says: places, sizes and ranges of its columns."""
    return hashlib.blake2b(f"{name}\0{json.dumps(group, default=str)}".encode(), digest_size=16).hexdigest()


def _names_in(metadata: dict[bytes, bytes], column: str | None) -> tuple[str, ...] | None:
    """Hugging Face's class names, where its metadata have them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = tuple(features[column]["names"])
        return names if names and all(isinstance(name, str) for name in names) else None
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
