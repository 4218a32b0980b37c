"""Inputs of ddpm-shards make. To add one: a class or function here, and a line in SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ddpm_dist.data.sources.arrays import digits, fashion_mnist, idx
from ddpm_dist.data.sources.base import Item, Source, normal
from ddpm_dist.data.sources.cifar import cifar10
from ddpm_dist.data.sources.emoji import Emoji
from ddpm_dist.data.sources.files import folder, tar_archive, zip_archive
from ddpm_dist.data.sources.labels import FOLDERS, NONE
from ddpm_dist.data.sources.layout import Choice
from ddpm_dist.data.sources.npz import npz
from ddpm_dist.data.sources.parquet import Parquet
from ddpm_dist.data.sources.tables import Indexed, Lsun
from ddpm_dist.errors import ConfigError


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about the input."""

    inputs: tuple[str, ...] = ()
    split: str | None = None
    labels: str | None = None
    """File, array or column of labels; "folders", or "none"."""
    size: int | None = None
    images: str | None = None
    """Array or column of images."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Globs of the files to take, and of those to leave out."""
    sparse: str | None = None
    """What class numbers with big gaps are: "keep" or "renumber"."""
    index: str | None = None
    """Folder of the input's index, if it isn't with its shards."""

    @property
    def choice(self) -> Choice:
        """What of it a source needs to know to choose its files and labels."""
        return Choice(self.split, self.labels, self.include, self.exclude, self.sparse)

    def normal(self, kind: str) -> "SourceOptions":
        """With each place spelt so that it means the same in any process."""
        labels = self.labels
        if labels not in (None, NONE, FOLDERS) and kind in LABELS_FROM_A_FILE:
            labels = normal(labels)
        index = None if self.index is None else normal(self.index)
        return replace(self, inputs=tuple(map(normal, self.inputs)), labels=labels, index=index)


SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": lambda o: digits(),
    "fashion-mnist": lambda o: fashion_mnist(_one("fashion-mnist", o) if o.inputs else None, o.split or "train"),
    "emoji": lambda o: Emoji(_one("emoji", o) if o.inputs else None, o.split or "train", o.size or 32),
    "cifar10": lambda o: cifar10(_one("cifar10", o), o.split or "train"),
    "idx": lambda o: idx(_one("idx", o), o.labels),
    "npz": lambda o: npz(_one("npz", o), o.images, o.labels, o.sparse),
    "folder": lambda o: folder(_one("folder", o), o.choice),
    "zip": lambda o: zip_archive(_one("zip", o), o.choice),
    "tar": lambda o: tar_archive(_one("tar", o), o.choice),
    "parquet": lambda o: Parquet(o.inputs, o.choice, o.images),
    "lsun": lambda o: Lsun(_one("lsun", o)),
    "webdataset": lambda o: Indexed(_one("webdataset", o), o.index),
}
IN_PARTS = ("fashion-mnist", "emoji", "cifar10", "folder", "zip", "tar", "parquet")
LABELS_FROM_A_FILE = ("idx", "folder", "zip", "tar")
LABELS_BY_NAME = ("npz", "parquet")
OF_FILES = ("folder", "zip", "tar", "parquet")


def open_source(kind: str, options: SourceOptions) -> Source:
    """The input of a kind; ConfigError for a kind that isn't there, and for an option that it has no use for."""
    if kind not in SOURCES:
        raise ConfigError(f"{kind!r} is not an input; there are {', '.join(SOURCES)}")
    if kind == "digits" and options.inputs:
        raise ConfigError(f"digits: they need no INPUT, {options.inputs[0]} is given")
    if options.split is not None and kind not in IN_PARTS:
        raise ConfigError(f"--split {options.split}: {kind} has no parts; {', '.join(IN_PARTS)} have")
    if options.labels is not None and kind not in LABELS_FROM_A_FILE + LABELS_BY_NAME:
        raise ConfigError(
            f"--labels {options.labels}: {kind} takes its labels from the input alone; leave the option out"
        )
    if options.images is not None and kind not in LABELS_BY_NAME:
        raise ConfigError(f"--images {options.images}: {kind} has no names for it; {', '.join(LABELS_BY_NAME)} have")
    if (options.include or options.exclude) and kind not in OF_FILES:
        raise ConfigError(f"--include, --exclude: {kind} is not made of files; {', '.join(OF_FILES)} are")
    if options.sparse is not None and kind not in OF_FILES + LABELS_BY_NAME:
        raise ConfigError(f"--sparse-labels {options.sparse}: {kind} has no class numbers with gaps")
    if options.index is not None and kind != "webdataset":
        raise ConfigError(f"--index {options.index}: {kind} has no index; the input webdataset has one")
    return SOURCES[kind](options)


def _one(kind: str, options: SourceOptions) -> str:
    if len(options.inputs) != 1:
        raise ConfigError(f"{kind}: one INPUT is wanted before the URL, {len(options.inputs)} are given")
    return options.inputs[0]


__all__ = ["SOURCES", "Item", "Source", "SourceOptions", "open_source"]
