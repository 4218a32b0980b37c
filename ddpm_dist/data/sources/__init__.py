"""Inputs of ddpm-shards make. To add one: a class or function here, and a line in SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass

from ddpm_dist.data.sources.arrays import cifar10, digits, fashion_mnist, idx, npz
from ddpm_dist.data.sources.base import Item, Source
from ddpm_dist.data.sources.emoji import Emoji
from ddpm_dist.data.sources.files import folder, tar_archive, zip_archive
from ddpm_dist.data.sources.tables import Indexed, Lsun, Parquet
from ddpm_dist.errors import ConfigError


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about the input."""

    inputs: tuple[str, ...] = ()
    split: str = "train"
    labels: str | None = None
    """File of labels, or "none"."""
    size: int | None = None


SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": lambda o: digits(),
    "fashion-mnist": lambda o: fashion_mnist(_one("fashion-mnist", o) if o.inputs else None, o.split),
    "emoji": lambda o: Emoji(_one("emoji", o) if o.inputs else None, o.split, o.size or 32),
    "cifar10": lambda o: cifar10(_one("cifar10", o), o.split),
    "idx": lambda o: idx(_one("idx", o), o.labels),
    "npz": lambda o: npz(_one("npz", o), o.labels),
    "folder": lambda o: folder(_one("folder", o), o.labels),
    "zip": lambda o: zip_archive(_one("zip", o), o.labels),
    "tar": lambda o: tar_archive(_one("tar", o), o.labels),
    "parquet": lambda o: Parquet(o.inputs, o.labels),
    "lsun": lambda o: Lsun(_one("lsun", o)),
    "webdataset": lambda o: Indexed(_one("webdataset", o)),
}
IN_PARTS = ("fashion-mnist", "emoji", "cifar10")
LABELS_FROM_A_FILE = ("idx", "folder", "zip", "tar")
LABELS_OR_NONE = ("npz", "parquet")


def open_source(kind: str, options: SourceOptions) -> Source:
    """The input of a kind; ConfigError for a kind that isn't there, and for an option that it has no use for."""
    if kind not in SOURCES:
        raise ConfigError(f"{kind!r} is not an input; there are {', '.join(SOURCES)}")
    if kind == "digits" and options.inputs:
        raise ConfigError(f"digits: they need no INPUT, {options.inputs[0]} is given")
    if options.split != "train" and kind not in IN_PARTS:
        raise ConfigError(f"--split {options.split}: {kind} has no parts; {', '.join(IN_PARTS)} have")
    if options.labels is not None and kind not in LABELS_FROM_A_FILE:
        remedy = "--labels none drops them" if kind in LABELS_OR_NONE else "leave the option out"
        if kind not in LABELS_OR_NONE or options.labels != "none":
            raise ConfigError(f"--labels {options.labels}: {kind} takes its labels from the input alone; {remedy}")
    return SOURCES[kind](options)


def _one(kind: str, options: SourceOptions) -> str:
    if len(options.inputs) != 1:
        raise ConfigError(f"{kind}: one INPUT is wanted before the URL, {len(options.inputs)} are given")
    return options.inputs[0]


__all__ = ["SOURCES", "Item", "Source", "SourceOptions", "open_source"]
