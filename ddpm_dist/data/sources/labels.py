"""Class labels of files: from their folders, or from a CSV or JSON file."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ddpm_dist.data.sources.base import open_input
from ddpm_dist.errors import DataError

Labels = tuple[list[int] | None, tuple[str, ...] | None]
"""(class of each file, names of the classes)."""


def label_files(names: Sequence[str], labels: str | None) -> Labels:
    """Classes of files by the path below the input.

    labels: a CSV (file, class) or JSON file ({file: class}, or EDM's {"labels": [[file, class], …]}); "none"
    for no labels; without it, the first folder in which files differ is the class, if every file lies in one.
    """
    if labels == "none":
        return None, None
    if labels is not None:
        return from_mapping(names, read_labels(labels), labels)
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    shallowest = min(map(len, folders), default=0)
    # Levels at which all files agree are no classes: a zip often holds one folder with everything in it.
    depth = next((d for d in range(shallowest) if len({parts[d] for parts in folders}) > 1), shallowest)
    if depth == shallowest:
        return None, None
    return from_mapping(names, {name: parts[depth] for name, parts in zip(names, folders, strict=True)}, "")


def from_mapping(names: Sequence[str], classes: Mapping[str, str | int], place: str) -> Labels:
    """Class numbers stay as they are; class names are numbered in sorted order."""
    missing = next((name for name in names if name not in classes), None)
    if missing is not None:
        raise DataError(f"--labels {place}: {missing} has no class there (of {len(names)} files)")
    values = [classes[name] for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, (int, str)) or value == "":
            raise DataError(
                f"--labels {place}: {name}: {value!r} is not a class; a number (0, 1, …) or a name is wanted"
            )
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        known = tuple(sorted({str(value) for value in values}))
        by_name = {name: number for number, name in enumerate(known)}
        return [by_name[str(value)] for value in values], known
    if min(numbers, default=0) < 0:
        raise DataError(f"--labels {place}: class {min(numbers)}; classes are 0, 1, …")
    return numbers, None


def read_labels(path: str) -> dict[str, str | int]:
    with open_input(path, "a CSV or JSON file of labels") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
        if path.endswith(".json"):
            values = json.loads(text)
            pairs = values["labels"] if isinstance(values, dict) and "labels" in values else values
            return dict(pairs.items() if isinstance(pairs, dict) else pairs)
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        if not rows or min(len(row) for row in rows) < 2:
            raise ValueError("each line is file,class")
    except (ValueError, TypeError, UnicodeError) as error:
        raise DataError(f"--labels {path}: {error}; a CSV with file,class or a JSON object {{file: class}}") from None
    # A header names its columns; a line of data has a file name with an extension.
    body = rows[1:] if "." not in rows[0][0] else rows
    return {row[0].strip(): row[1].strip() for row in body}
