"""What a class is, whoever says it: a member of a tar, a line, a column, a folder. Nothing is guessed."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from ddpm_dist.errors import ConfigError

KEEP, RENUMBER = "keep", "renumber"
SPARSE = (KEEP, RENUMBER)
"""What numbers with big gaps are: classes with their numbers, or their names."""
MAX_CLASS = 2**31 - 1
MAX_NAME = 200
"""Characters of a class name; what is longer is a text about the image."""
BOM = "\ufeff"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def class_value(value: object) -> int | str | None:
    """The number of a class (3, 3.0, "3", " 3.0\\n"), or its name; None for what is neither.

    Neither are fractions, negative numbers, true and false, nothing, several lines, and JSON's lists and objects.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        text = value.removeprefix(BOM).strip()
        if not _NUMBER.fullmatch(text):
            return text if 0 < len(text) <= MAX_NAME and text.isprintable() and not _is_json(text) else None
        value = float(text)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_CLASS else None


def _is_json(text: str) -> bool:
    if text[0] not in "[{":
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_names(names: Sequence[str], samples: int) -> None:
    """ConfigError for what says something about each image rather than its class, and for names that look the same.

    names: different ones, sorted.
    """
    if len(names) > 100 and 2 * len(names) > samples:
        raise ConfigError(
            f"labels: {len(names)} different ones for {samples} samples ({names[0]!r:.40}, …) are no classes; without "
            f"labels: --label none (of ddpm-shards make: --labels none)"
        )
    twins = look_alikes(names)
    if twins:
        raise ConfigError(
            f"labels: the classes {twins[0]} and {twins[1]} look the same but aren't ({twins[0]!a}, "
            f"{twins[1]!a}); which are meant? Rename one, or say the classes with --labels FILE"
        )


def look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Two different names that show as one: é as one character or as two, spaces at an end."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(composed(name.strip()), name)
        if other != name:
            return other, name
    return None


def composed(name: str) -> str:
    """A name with its accents in one character each (NFC): macOS has written file names with two."""
    return unicodedata.normalize("NFC", name)


def sparse_numbers(numbers: Iterable[int], sparse: str | None) -> list[int] | None:
    """The class numbers that are to be taken for names, in order; None where they are the numbers of classes.

    sparse: one of SPARSE. ConfigError without it, where more than half, and more than 100, of the classes up to the
    largest would be empty.
    """
    there = sorted(set(numbers))
    if not there or sparse == KEEP:
        return None
    empty = there[-1] + 1 - len(there)
    if sparse == RENUMBER:
        return there if empty else None
    if empty > max(100, len(there)):
        shown = ", ".join(map(str, there[:3])) + (", …" if len(there) > 3 else "")
        raise ConfigError(
            f"labels: {len(there)} numbers ({shown}) up to {there[-1]}: --sparse-labels renumber makes {len(there)} "
            f"classes, called by their numbers; --sparse-labels keep makes {there[-1] + 1}, {empty} of them empty"
        )
    return None
