"""How the samples of a foreign tar are read: where a key ends, which member is the image, what its class is.

Nothing is guessed. What can be read in two ways is a ConfigError that lists what a sample holds and what can be said.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from ddpm_dist.data import tar
from ddpm_dist.data.classes import SPARSE, class_value, composed
from ddpm_dist.errors import ConfigError, DataError

CLS, JSON, NO_LABELS = "cls", "json", "none"
SHOWN = 12
REMEDY = "--label none leaves all labels out, --labels FILE says them"


@dataclass(frozen=True)
class Reading:
    """What the user says about a set of others; the defaults are what this project's own sets need."""

    KEYS: ClassVar = tuple(tar.KEYS)
    SPARSE: ClassVar = SPARSE

    label: str = CLS
    """Extension of the member with the class, `json:FIELD` for a field of the .json member, or "none"."""
    labels: str | None = None
    """Instead: a CSV or JSON file of {path or key: class}."""
    image: str | None = None
    """Extension of the image's member, or a pattern (*.jpg) for it or for its file's name; none: the only image."""
    keys: str = tar.FIRST_DOT
    """Where a key ends in a file's name: one of KEYS."""
    sparse: str | None = None
    """What numbers with big gaps are: one of SPARSE."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Globs of the shards to take, and of those to leave out; * matches / as well."""

    @property
    def label_member(self) -> tuple[str, str]:
        """(extension of the member with the class, field of its JSON or "")."""
        extension, _, field = self.label.partition(":")
        return extension.lower().removeprefix("."), field

    def split(self, path: str) -> tuple[str | None, str]:
        """(key or None, extension) of a path, by `keys`."""
        return tar.KEYS[self.keys](path)


def image_of(members: Sequence[tar.Member], reading: Reading, shard: str) -> tar.Member | None:
    """The member with a sample's image, None without one; ConfigError where it could be several."""
    if reading.image:
        wanted = reading.image.lower().removeprefix(".")
        found = [m for m in members if fnmatchcase(m.extension, wanted) or fnmatchcase(_file_name(m).lower(), wanted)]
    else:
        found = [m for m in members if m.extension in tar.IMAGE_EXTENSIONS]
        compound = [m for m in members if m.extension.rpartition(".")[2] in tar.IMAGE_EXTENSIONS]
        if not found and compound:
            raise ConfigError(
                f"{shard}: {_holds(members)}. WebDataset ends a key at the first dot of a file's name. If it ends "
                f"at the last one here: --keys {tar.LAST_DOT}; if these are parts of a sample: --image "
                f"{compound[0].extension}"
            )
    if len(found) > 1:
        said = f" that match --image {reading.image}" if reading.image else ""
        raise ConfigError(
            f"{shard}: {_holds(members)}: {len(found)} images{said}; say which one is meant, such as --image "
            f"{found[0].extension}"
        )
    return found[0] if found else None


def shown_members(members: Sequence[tar.Member]) -> str:
    """ ".cls, .json" """
    listed = ", ".join(f".{m.extension}" for m in members[:SHOWN])
    return listed + (f", … ({len(members)} in all)" if len(members) > SHOWN else "")


def _holds(members: Sequence[tar.Member]) -> str:
    return f"sample {members[0].key} holds {shown_members(members)}"


def _file_name(member: tar.Member) -> str:
    return f"{member.key.rpartition('/')[2]}.{member.extension}"


def class_of(
    data: bytes,
    files: Mapping[str, tar.Member],
    reading: Reading,
    labels: Mapping[str, object] | None,
    shard: str,
) -> int | str | None:
    """The class number or class name of a sample, None without a label. Raises DataError, ConfigError.

    labels: those of the reading's file.
    """
    key = next(iter(files.values())).key
    if labels is not None:
        paths = [*(f"{key}.{extension}" for extension in files), key]
        found = next((path for path in map(composed, paths) if path in labels), None)
        if found is None:
            raise ConfigError(f"--labels {reading.labels}: has no class for {paths[0]} (in {shard}), nor for {key}")
        return _class(labels[found], f"--labels {reading.labels}: {found}", "its class")
    extension, field = reading.label_member
    member = files.get(extension) if reading.label != NO_LABELS else None
    if member is None:
        return None
    raw, place = data[member.offset : member.offset + member.size], f"{shard}: {key}"
    if extension == JSON and not field:
        raise ConfigError(f"--label json: which field ({_shown_fields(raw)})? Write --label json:FIELD")
    if not field:
        try:
            value: Any = raw.decode()
        except UnicodeDecodeError:
            value = raw
    else:
        try:
            fields = dict(json.loads(raw))
        except (ValueError, TypeError, RecursionError):
            raise DataError(f"{place}.json: {raw[:40]!r} is not a JSON object") from None
        if field not in fields:
            raise DataError(f"{place}.json: no field {field!r}; it has {', '.join(fields) or 'none'}")
        value = fields[field]
    return _class(value, place, f"its label ({reading.label})")


def _shown_fields(raw: bytes) -> str:
    try:
        return ", ".join(list(dict(json.loads(raw)))[:SHOWN])
    except (ValueError, TypeError, RecursionError):
        return f"{raw[:40]!r}"


def _class(value: Any, place: str, what: str) -> int | str:
    found = class_value(value)
    if found is None:
        raise DataError(
            f"{place}: {what} is {value!r:.40}; a class number (0, 1, …) or a class name is wanted; --label none takes "
            f"no labels"
        )
    return found


def names_among(classes: Sequence[int | str | None], shard: str) -> list[str]:
    """The class names among the labels of a shard, sorted; empty for numbers or no labels.

    DataError where some samples have no label, or numbers stand among names.
    """
    kinds = {type(value) for value in classes}
    if len(kinds) > 1 and type(None) in kinds:
        raise DataError(
            f"{shard}: some samples have a label, others ({classes.count(None)} of {len(classes)}) don't; {REMEDY}"
        )
    names = sorted({value for value in classes if isinstance(value, str)})
    if names and int in kinds:
        number = next(value for value in classes if isinstance(value, int))
        raise DataError(f"{shard}: labels are names ({names[0]}) and numbers ({number}), where one is wanted; {REMEDY}")
    return names
