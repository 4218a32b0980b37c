"""Parts of a published set that lie side by side (train, val, test): never mixed, never taken for classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ddpm_dist.errors import ConfigError, DataError

ALL = "all"
WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
    "eval": "eval", "extra": "extra", "heldout": "heldout", "holdout": "heldout",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip
"""What a part is called: its usual name."""

_SPLIT = re.compile(
    rf"({'|'.join(WORDS)})([-_. ]?(\d.*|set|images?|imgs?|data|split|[ab]))?(\.[a-z0-9.]+)?", re.IGNORECASE
)


def split_of(name: str) -> str | None:
    """ "val" of `validation`, `val2017`, `valid-00000-of-00014.parquet`; None for a name that says no part."""
    found = _SPLIT.fullmatch(name)
    return WORDS[found[1].lower()] if found else None


def are_splits(names: Iterable[str], place: str) -> bool:
    """Whether folders side by side are parts of a set; DataError where that can't be told.

    Two parts make it plain. `train` alone among other names is a class (a vehicle); any other part is not.
    """
    kinds = {name: split_of(name) for name in names}
    parts = {kind for kind in kinds.values() if kind}
    if len(parts) >= 2:
        return True
    odd = [name for name, kind in kinds.items() if kind and kind != "train"]
    if odd and None in kinds.values():
        others = sorted(name for name, kind in kinds.items() if not kind)
        raise DataError(
            f"{place}: is {odd[0]} a class beside {', '.join(others[:3])}, or a part of the set? --labels folders says "
            f"it is a class, --include or --exclude GLOB choose what is taken"
        )
    return False


def choose(kinds: Mapping[str, str | None], split: str | None, place: str) -> set[str]:
    """The names (of folders or files) that a split means, of {name: part}; DataError says what there is."""
    there = sorted({kind or "another" for kind in kinds.values()})
    listed = ", ".join(sorted(kinds)[:8]) + (", …" if len(kinds) > 8 else "")
    if split is None:
        raise DataError(
            f"{place}: holds parts of a set side by side ({listed}), which are not to be mixed: choose one with "
            f"--split {' or '.join(kind for kind in there if kind != 'another')} (or --include GLOB); --split {ALL} "
            f"takes all"
        )
    if split == ALL:
        return set(kinds)
    if split in kinds:
        return {split}
    wanted = split_of(split) or split
    found = {name for name, kind in kinds.items() if kind == wanted}
    if not found:
        raise DataError(f"--split {split}: {place} has {listed}")
    return found


def part_of(path: str) -> str | None:
    """The part that a path names, in a folder or in the file itself."""
    return next(filter(None, map(split_of, PurePosixPath(path).parts)), None)


def takes(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether globs of paths choose a file; * matches / as well."""
    wanted = not include or any(fnmatchcase(name, glob) for glob in include)
    return wanted and not any(fnmatchcase(name, glob) for glob in exclude)


def choose_shards(names: Iterable[str], include: Sequence[str], exclude: Sequence[str], place: str) -> list[str]:
    """The shards that are taken; ConfigError where parts of a set lie side by side and nothing says which is meant."""
    names = list(names)
    taken = [name for name in names if takes(name, include, exclude)]
    if names and not taken:
        raise ConfigError(f"{place}: --include and --exclude leave none of {', '.join(names[:3])}")
    examples = {part_of(name): name for name in reversed(taken)}
    if len(examples) > 1 and not include:
        globs = " or ".join(sorted(f"--include '*{part}*'" for part in examples if part))
        raise ConfigError(
            f"{place}: shards of parts of a set lie side by side ({', '.join(sorted(examples.values()))}), which are "
            f"not to be mixed: {globs} chooses, --include '*' takes all"
        )
    return taken
