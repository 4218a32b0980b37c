"""Class labels: from folders, from a CSV or JSON file, from whatever values an input has for its images."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_dist.data.classes import check_names, class_value, composed, look_alikes, sparse_numbers
from ddpm_dist.data.sources.base import open_input, reading, shown
from ddpm_dist.errors import DataError
from ddpm_dist.progress import counted

Labels = tuple[list[int] | None, tuple[str, ...] | None]
"""(class of each file, names of the classes)."""

NONE, FOLDERS = "none", "folders"
FILE_COLUMNS = ("file", "filename", "file_name", "image", "path", "name")
CLASS_COLUMNS = ("class", "label")


def number_classes(values: Sequence[object], where: Callable[[int], str], sparse: str | None = None) -> Labels:
    """Class numbers (also as text, also 3.0) stay as they are; class names are numbered in sorted order.

    where: says where value i stands, for the DataError about one that is neither, or about numbers among names.
    sparse: what numbers with big gaps are (one of `classes.SPARSE`).
    """
    parsed: dict[object, int | str] = {}
    first: dict[type, int] = {}
    for i, value in enumerate(values):
        key = (type(value), value) if isinstance(value, (bool, int, float, str, np.generic)) else None
        if key is None or key not in parsed:
            found = _class_of(value, where(i))
            first.setdefault(type(found), i)
            parsed[key] = found
    if int in first and str in first:
        name, number = values[first[str]], values[first[int]]
        raise DataError(
            f"{where(first[str])}: class {name!r}, but {where(first[int])}: class {number!r}; all are to be numbers, "
            f"or all names"
        )
    classes = [parsed[(type(value), value)] for value in values]
    if int in first or not first:
        numbers = [int(number) for number in classes]
        names = sparse_numbers(numbers, sparse)
        if names is None:
            return numbers, None
        place = {number: i for i, number in enumerate(names)}
        return [place[number] for number in numbers], tuple(map(str, names))
    known = tuple(sorted({str(name) for name in classes}))
    check_names(known, len(classes))
    by_name = {name: number for number, name in enumerate(known)}
    return [by_name[str(name)] for name in classes], known


def _class_of(value: object, place: str) -> int | str:
    """A class's number, or its name; a column of true and false is one of 1 and 0."""
    found = class_value(int(value) if isinstance(value, bool) else value)
    if found is None:
        remedy = "where −1 stands for no label, --labels none drops them" if value == -1 else "--labels none takes none"
        raise DataError(f"{place}: {value!r:.60} is not a class; a number (0, 1, …) or a name is wanted; {remedy}")
    return found


def number_folders(names: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """{folder: class number} and names: folders 0…n−1 are numbers, any others are names, sorted."""
    names = set(names)
    if all(re.fullmatch("[0-9]{1,9}", name) for name in names):
        ordered = sorted(names, key=lambda name: (int(name), name))
        if [int(name) for name in ordered] == list(range(len(ordered))):
            return {name: int(name) for name in ordered}, None
    else:
        ordered = sorted(names)
    if any(shown(name) != name for name in ordered):
        bad = next(name for name in ordered if shown(name) != name)
        raise DataError(f"class folder {shown(bad)}: its name is not UTF-8; rename it, or give --labels FILE or none")
    if twins := look_alikes(ordered):
        raise DataError(
            f"class folders {twins[0]} and {twins[1]} look the same but aren't ({twins[0]!a}, {twins[1]!a}); "
            f"rename one, or give --labels FILE or none"
        )
    return {name: number for number, name in enumerate(ordered)}, tuple(ordered)


def describe_classes(labels: Iterable[int], class_names: Sequence[str] | None) -> str:
    """ "3 classes: cat, dog, eel": their number and three names."""
    seen = sorted(set(labels))
    count = max(len(class_names or ()), (seen[-1] if seen else -1) + 1)
    names = class_names if class_names else [str(number) for number in seen]
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    absent = "" if class_names or len(seen) == count else f" ({len(seen)} of them occur)"
    return f"{count} {'class' if count == 1 else 'classes'}{absent}: {listed}"


def from_mapping(names: Sequence[str], classes: Mapping[str, object], place: str, sparse: str | None) -> Labels:
    """Classes of files by {file: class}, its names composed; DataError for a file that isn't there."""
    missing = [name for name in names if composed(name) not in classes]
    if missing:
        taken = set(names)
        example = next((f"; it names {name}" for name in classes if name not in taken), "")
        raise DataError(
            f"{place}: {shown(missing[0])} has no class there ({len(missing)} of {len(names)} files have none){example}"
        )
    values = [classes[composed(name)] for name in names]
    return number_classes(values, lambda i: f"{place}: {shown(names[i])}", sparse)


def read_labels(path: str) -> dict[str, object]:
    """{file: class} of a CSV or JSON file."""
    with open_input(path, "a CSV or JSON file of labels") as file:
        data = file.read()
    place = f"--labels {path}"
    if path.lower().endswith(".json"):
        found = parse_json(data, place)
        if found is None:
            raise DataError(f"{place}: its labels are null; --labels none says that there are none")
        return found
    if data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        raise DataError(
            f"{place}: is JSON by its look: one object {{file: class}} is read from a file that ends in .json, several "
            f"lines of JSON aren't; a CSV with file,class is"
        )
    return _parse_csv(data, place)


def parse_json(data: bytes, place: str) -> dict[str, object] | None:
    """{file: class} of {file: class}, or of EDM's and StyleGAN's {"labels": [[file, class], …] or null}."""
    with reading(place, "a JSON object {file: class}"):
        values: Any = json.loads(data.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _once(pairs, place))
        pairs = values["labels"] if isinstance(values, dict) and "labels" in values else values
        if pairs is None:
            return None
        if isinstance(pairs, list):
            if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
                raise ValueError("labels is to be a list of [file, class]")
            pairs = _once([tuple(pair) for pair in pairs], place)
        if not isinstance(pairs, dict):
            raise ValueError(f"it is {str(pairs)[:40]!r}")
        return _once([(_tidy(name), value) for name, value in pairs.items()], place)


def _parse_csv(data: bytes, place: str) -> dict[str, object]:
    with reading(place, "a CSV with file,class or a JSON object {file: class}"):
        lines = enumerate(csv.reader(io.StringIO(data.decode("utf-8-sig")), strict=True), start=1)
        rows = [(number, [cell.strip() for cell in row]) for number, row in lines if any(row)]
    if not rows:
        raise DataError(f"{place}: it is empty; a CSV with file,class is wanted")
    head = [cell.lower() for cell in rows[0][1]]
    columns = (0, 1)
    if len(head) > 2:
        found = [
            next((i for i, cell in enumerate(head) if cell in known), None) for known in (FILE_COLUMNS, CLASS_COLUMNS)
        ]
        if None in found:
            raise DataError(
                f"{place}: {len(head)} columns ({', '.join(head)[:60]}); with more than two, a first line is to name "
                f"them: file and class"
            )
        columns = (found[0], found[1])  # type: ignore[assignment]
    for number, row in rows:
        if len(row) != len(head) or len(row) < 2:
            line = ",".join(row)
            raise DataError(
                f"{place}: line {number} has {counted(len(row), 'column')} ({line!r:.40}); each is file,class, with a "
                f"comma between"
            )
    if head[columns[0]] in FILE_COLUMNS and head[columns[1]] in CLASS_COLUMNS:
        rows = rows[1:]  # any other first line is no file of the input, so it does no harm
    return _once([(_tidy(row[columns[0]]), row[columns[1]]) for _, row in rows], place)


def _once(pairs: Iterable[tuple[Any, Any]], place: str) -> dict[Any, Any]:
    """The pairs as a dict; DataError for a name that has two different values."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise DataError(f"{place}: {name} stands twice, with {found[name]!r:.40} and {value!r:.40}")
        found[name] = value
    return found


def _tidy(name: str) -> str:
    return composed(name.replace("\\", "/").removeprefix("./").lstrip("/"))
