"""A node as a cluster describes it. Needs no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodePlace:
    """A node's name and address, and what workers may take of it."""

    name: str
    """Its host's, with a number where several nodes have the same."""
    address: str
    cpus: float
    gpus: float
    """Logical ones, of which workers get theirs."""


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that several have: a, b-1, b-2."""
    return [f"{name}-{names[: at + 1].count(name)}" if names.count(name) > 1 else name for at, name in enumerate(names)]
