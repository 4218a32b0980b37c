"""Which files of an input are its images, which part of it is taken, and which classes their folders name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddpm_dist.data.sources import splits
from ddpm_dist.data.sources.base import shown
from ddpm_dist.data.sources.labels import FOLDERS, describe_classes, number_folders
from ddpm_dist.errors import DataError

EXTENSIONS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".ppm", ".pgm", ".pnm",
    ".tif", ".tiff",
)  # fmt: skip
LEFTOVERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders that systems leave behind; what is hidden (._name.jpg, .ipynb_checkpoints, .cache) is left out as well."""


@dataclass(frozen=True)
class Choice:
    """What the user says about the files of an input."""

    split: str | None = None
    labels: str | None = None
    """File of labels, "folders", or "none"."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Globs of paths below the input; * matches / as well."""
    sparse: str | None = None
    """What class numbers with big gaps are: "keep" or "renumber"."""

    def takes(self, name: str) -> bool:
        return splits.takes(name, self.include, self.exclude)


def is_image(name: str) -> bool:
    """By its extension, and not a leftover."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS and not is_leftover(name)


def is_leftover(name: str) -> bool:
    return any((part.startswith(".") and part != "..") or part in LEFTOVERS for part in PurePosixPath(name).parts)


def left_out(names: Iterable[str], choice: Choice) -> str | None:
    """What of an input is no image, or not chosen: counted by its kind, each with an example."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name in names:
        if is_leftover(name):
            kind = "hidden or left by a system"
        elif not is_image(name):
            kind = PurePosixPath(name).suffix.lower() or "without extension"
        elif not choice.takes(name):
            kind = "by --include and --exclude"
        else:
            continue
        counts[kind] += 1
        examples.setdefault(kind, name)
    listed = [f"{count} {kind} ({shown(examples[kind])})" for kind, count in counts.most_common(8)]
    more = sum(counts.values()) - sum(count for _, count in counts.most_common(8))
    return f"left out: {', '.join(listed)}{f', {more} others' if more else ''}" if counts else None


def check_pairs(names: Sequence[str], choice: Choice, place: str) -> str | None:
    """DataError for images and something like their masks under the same names (a.jpg, a.png); some are only said."""
    stems = Counter(str(PurePosixPath(name).with_suffix("")) for name in names)
    doubled = [stem for stem, count in stems.items() if count > 1]
    if not doubled or choice.include:
        return None
    twins = [name for name in names if str(PurePosixPath(name).with_suffix("")) == doubled[0]]
    example = " and ".join(map(shown, twins[:3]))
    if 2 * len(doubled) >= len(stems):
        globs = " or ".join(sorted({f"--include '*{PurePosixPath(name).suffix}'" for name in twins}))
        raise DataError(
            f"{place}: {len(doubled)} of {len(stems)} names stand for more than one image ({example}): are some "
            f"of them masks? {globs} chooses, --include '*' takes them all"
        )
    return f"{len(doubled)} names stand for more than one image ({example}); all are taken"


class Folders:
    """The folders that images lie in: which part of the set is taken, and what the classes are."""

    def __init__(self, names: Sequence[str], choice: Choice, place: str) -> None:
        self._choice, self._place = choice, place
        self._parts = {name: PurePosixPath(name).parts for name in names}
        level = _common(self._parts.values())
        side_by_side = sorted({parts[level] for parts in self._parts.values() if len(parts) > level + 1})
        self._part_level: int | None = None
        self.names = list(names)
        self.part: str | None = None
        if choice.labels != FOLDERS and splits.are_splits(side_by_side, place):
            self._part_level, self.names = level, self._choose(side_by_side, level)
        elif choice.labels != FOLDERS and _numbered_parts(names):
            self.names = self._choose_files()
        elif choice.split is not None and choice.split != splits.ALL:
            raise DataError(f"--split {choice.split}: {place} has no parts such as train and test side by side")

    def _choose(self, folders: Sequence[str], level: int) -> list[str]:
        chosen = splits.choose({name: splits.split_of(name) for name in folders}, self._choice.split, self._place)
        if self._choice.split != splits.ALL:
            if len(chosen) > 1:
                raise DataError(
                    f"--split {self._choice.split}: {self._place} has {', '.join(sorted(chosen))}; name one"
                )
            (self.part,) = chosen
        return [name for name, parts in self._parts.items() if len(parts) > level + 1 and parts[level] in chosen]

    def _choose_files(self) -> list[str]:
        kinds = {name: splits.split_of(PurePosixPath(name).name) for name in self._parts}
        chosen = splits.choose(kinds, self._choice.split, self._place)
        return [name for name in self._parts if name in chosen]

    def classes(self) -> tuple[list[int] | None, tuple[str, ...] | None, str]:
        """(class of each of `names`, class names, what is to be said about it)."""
        folders = {name: self._below(self._parts[name]) for name in self.names}
        level = _common(folders.values())
        at = "/".join(next(iter(folders.values()))[:level]) if folders else ""
        stray = [name for name, parts in folders.items() if len(parts) <= level + 1]
        if len(stray) == len(folders):
            return None, None, f"no labels: all images lie in one folder{f' ({shown(at)})' if at else ''}"
        if stray:
            raise DataError(
                f"{self._place}: {shown(stray[0])} lies in no class folder ({len(stray)} of {len(folders)} images): "
                f"leave such images out (--exclude, or --include '*/*'), or take no labels from folders (--labels none)"
            )
        found = {name: parts[level] for name, parts in folders.items()}
        numbers, class_names = number_folders(self._all_classes(set(found.values()), level))
        labels = [numbers[found[name]] for name in self.names]
        said = describe_classes(labels, class_names)
        return labels, class_names, f"{said} (the folders at {shown(at)}{'/' if at else ''}*)"

    def _below(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """A path without the folder of its part of the set."""
        if self._part_level is None:
            return parts
        return parts[: self._part_level] + parts[self._part_level + 1 :]

    def _all_classes(self, mine: set[str], level: int) -> set[str]:
        """The classes to number: those of the training part, where the chosen part has no others.

        So the same class has the same number in the sets that are made of all parts of an input.
        """
        if self._part_level is None or self.part is None or splits.split_of(self.part) == "train":
            return mine
        theirs = {
            self._below(parts)[level]
            for parts in self._parts.values()
            if len(parts) > level + 2 and splits.split_of(parts[self._part_level]) == "train"
        }
        odd = sorted(mine - theirs)
        if theirs and odd:
            raise DataError(
                f"{self._place}: {self.part} has a class {shown(odd[0])}, which the training part hasn't "
                f"({len(odd)} such): --labels FILE says which numbers they have, --labels none takes none"
            )
        return theirs or mine


def _common(paths: Iterable[Sequence[str]]) -> int:
    """Number of leading folders in which all lie: a zip often holds one folder with everything in it."""
    first: Sequence[str] | None = None
    common = 0
    for path in paths:
        if first is None:
            first, common = path, len(path) - 1
        common = min(common, len(path) - 1)
        common = next((i for i in range(common) if path[i] != first[i]), common)
    return common


def _numbered_parts(names: Sequence[str]) -> bool:
    """Whether flat files are called after parts of a set, all of them: train_0001.png, test_0001.png."""
    kinds = {splits.split_of(PurePosixPath(name).name) if "/" not in name else None for name in names}
    return None not in kinds and len(kinds) >= 2


def find_meta(names: Iterable[str], images: Sequence[str], place: str) -> str | None:
    """EDM's and StyleGAN's dataset.json above all images; DataError where there are two."""
    common = tuple(PurePosixPath(images[0]).parts[: _common([PurePosixPath(name).parts for name in images])])
    found = [
        name
        for name in names
        if (path := PurePosixPath(name)).name == "dataset.json" and path.parts[:-1] == common[: len(path.parts) - 1]
    ]
    if len(found) > 1:
        raise DataError(
            f"{place}: {' and '.join(map(shown, found[:2]))}: say which with --labels FILE, folders, or none"
        )
    return found[0] if found else None


def below(names: Sequence[str], meta: str) -> Mapping[str, str]:
    """{path as dataset.json gives it: file}."""
    prefix = meta.removesuffix("dataset.json")
    return {name.removeprefix(prefix): name for name in names}
