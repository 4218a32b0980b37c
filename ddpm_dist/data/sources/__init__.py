"""Inputs of tools/make_shards.py. To add one: a class or function here, and a line in SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass

from ddpm_dist.data.sources.arrays import digits, fashion_mnist, idx
from ddpm_dist.data.sources.base import Item, Source
from ddpm_dist.data.sources.emoji import Emoji
from ddpm_dist.errors import ConfigError


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about the input."""

    inputs: tuple[str, ...] = ()
    split: str = "train"
    labels: str | None = None
    size: int | None = None


SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": lambda o: digits(),
    "fashion-mnist": lambda o: fashion_mnist(_optional(o), o.split),
    "emoji": lambda o: Emoji(_optional(o), o.split, o.size or 32),
    "idx": lambda o: idx(_one("idx", o), o.labels),
}


def open_source(kind: str, options: SourceOptions) -> Source:
    """The input of a kind; ConfigError lists the kinds that there are."""
    if kind not in SOURCES:
        raise ConfigError(f"{kind!r} is not an input; there are {', '.join(SOURCES)}")
    return SOURCES[kind](options)


def _one(kind: str, options: SourceOptions) -> str:
    if len(options.inputs) != 1:
        raise ConfigError(f"{kind}: one input is wanted, {len(options.inputs)} are given")
    return options.inputs[0]


def _optional(options: SourceOptions) -> str | None:
    return options.inputs[0] if options.inputs else None


__all__ = ["SOURCES", "Item", "Source", "SourceOptions", "open_source"]
