"""A check: a function that looks at one thing, its name, and what mends it. It gives a row of the table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Generic, TypeVar

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.recipe import parse_config

S = TypeVar("S")


class State(StrEnum):
    """What a row says."""

    OK = "ok"
    REMARK = "remark"
    """It works, and could be better."""
    FAILED = "FAILED"
    SKIPPED = "-"
    """Nothing here needs it, or what it builds on has failed."""


@dataclass(frozen=True)
class Row:
    """What a check found."""

    check: str
    node: str
    """Its name; "" where it is a matter of all of them."""
    state: State
    found: str
    remedy: str = ""
    """Of what failed or could be better."""


class Finding(Exception):  # noqa: N818 - no error, a result
    """Raised in a check. remedy: where it is another one than the check's own."""

    state = State.FAILED

    def __init__(self, found: str, remedy: str | None = None) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


class Failed(Finding):
    """A run would fail here, or be wrong."""


class Remark(Finding):
    """A run works here, and could be better."""

    state = State.REMARK


class Skipped(Finding):
    """There is nothing to look at."""

    state = State.SKIPPED


@dataclass(frozen=True)
class Check(Generic[S]):
    """name: as the table has it. remedy: what mends it. look: what was found, in words; raises a Finding."""

    name: str
    remedy: str
    look: Callable[[S], str]

    def row(self, subject: S, node: str = "") -> Row:
        """Looks, and gives the row; what breaks the look itself is a remark, as it says nothing about the cluster."""
        try:
            return Row(self.name, node, State.OK, self.look(subject))
        except Finding as finding:
            remedy = "" if finding.state is State.SKIPPED else self.remedy if finding.remedy is None else finding.remedy
            return Row(self.name, node, finding.state, storage.redact(finding.found), remedy)
        except Exception as error:  # one look that breaks must not hide the others
            text = f"could not be looked at: {type(error).__name__}: {error}"
            return Row(self.name, node, State.REMARK, storage.redact(text).partition("\n")[0], self.remedy)


def check(name: str, remedy: str) -> Callable[[Callable[[S], str]], Check[S]]:
    """Makes a `Check` of the function below it."""
    return lambda look: Check(name, remedy, look)


@dataclass(frozen=True)
class Asked:
    """What a node is looked at for."""

    recipe: str | None
    """YAML of the configuration, if there is one."""
    nodes: int = 1
    """Of those that are there, how many share the workers."""
    works: bool = True
    """Whether workers may run on this node; on a head without CPUs they don't."""
    under_ray: bool = False
    folder: str | None = None
    """URL of a folder of the store's own for what is tried there."""
    first: bool = True
    """Whether this is the node that tries what needs to be tried once."""

    @cached_property
    def cfg(self) -> Config | None:
        """The configuration."""
        return None if self.recipe is None else parse_config(self.recipe)

    @property
    def config(self) -> Config:
        """The configuration, for checks that have nothing to look at without one."""
        if self.cfg is None:
            raise Skipped("no --config")
        return self.cfg

    @property
    def ranks_here(self) -> int:
        """Most training processes on this node."""
        workers = self.cfg.worker_range[1] if self.cfg else 1
        return math.ceil(workers / max(1, self.nodes)) if self.works else 0

    @property
    def wants_gpus(self) -> bool:
        """Whether workers here compute on GPUs."""
        return self.works and self.cfg is not None and self.cfg.cluster.gpus_per_worker > 0
