"""The nodes that are looked at, and how a function is called on each: alone, by Ray, or under a launcher."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ddpm_dist.cluster import NodePlace, distinct
from ddpm_dist.engine import World, gather_objects, init_world, launched, own_address

if TYPE_CHECKING:
    from ddpm_dist.cluster import Nodes

JOIN_S = 120.0
"""For the other processes of a launcher."""

Call = Callable[..., Any]


class Group(Protocol):
    """Nodes, in an order."""

    places: list[NodePlace]
    under_ray: bool
    speaks: bool
    """Whether this process is the one that prints."""

    def call(self, function: Call, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """function(*arguments[i]) on node i: what it returned, or the exception that kept it from it."""

    def total(self) -> dict[str, float] | None:
        """Resources that a cluster deals out; None where nobody does."""


class Alone:
    """This machine."""

    under_ray, speaks = False, True

    def __init__(self) -> None:
        self.places = [NodePlace(socket.gethostname(), "127.0.0.1", 1.0, 0.0)]

    def call(self, function: Call, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """In this process."""
        return [function(*given) for given in arguments]

    def total(self) -> None:
        """Nobody deals them out."""


class OfRay:
    """The nodes of RAY_ADDRESS."""

    under_ray, speaks = True, True

    def __init__(self, nodes: "Nodes") -> None:
        self._nodes, self.places = nodes, nodes.places

    def call(self, function: Call, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """In a process on each."""
        return self._nodes.call(function, arguments)

    def total(self) -> dict[str, float]:
        """By Ray's account."""
        return self._nodes.total()


class OfLauncher:
    """Those on which torchrun, mpirun, srun or deepspeed started this program; the first process of each speaks for it.

    All processes make the same calls in the same order.
    """

    under_ray = False

    def __init__(self, world: World) -> None:
        self._world, self.speaks = world, world.is_first
        mine = (socket.gethostname(), own_address(os.environ["MASTER_ADDR"]), world.local_rank)
        everybody = gather_objects(world, mine)
        self._speakers = [rank for rank, (_, _, local) in enumerate(everybody) if local == 0]
        names = distinct([everybody[rank][0] for rank in self._speakers])
        self.places = [
            NodePlace(name, everybody[rank][1], 1.0, 0.0) for name, rank in zip(names, self._speakers, strict=True)
        ]

    def call(self, function: Call, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """In the process that speaks for each; a collective."""
        result: Any = None
        if self._world.rank in self._speakers:
            try:
                result = function(*arguments[self._speakers.index(self._world.rank)])
            except Exception as error:  # it is the node's answer, and the others wait for one
                result = error
        gathered = gather_objects(self._world, result)
        return [gathered[rank] for rank in self._speakers]

    def total(self) -> None:
        """Nobody deals them out."""


@contextmanager
def group() -> Iterator[Group]:
    """The nodes to look at: those of RAY_ADDRESS, else those of a launcher, else this one.

    Raises ClusterError, within two minutes, if they can't be reached.
    """
    if os.environ.get("RAY_ADDRESS"):
        from ddpm_dist.cluster import Nodes  # where none is used, Ray need not be installed

        with Nodes() as nodes:
            yield OfRay(nodes)
    elif launched() > 1:
        yield OfLauncher(init_world(patience_s=JOIN_S))
    else:
        yield Alone()
