"""Pieces: which elements of which parameter a rank owns, whatever the ZeRO stage, and how they come together.

Over all ranks the pieces partition every parameter, so what is done to pieces (moving averages, saving,
loading) is done to each element by one rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist.engine.world import World, gather_objects

Address = tuple[str, int, int]
"""(name of a parameter, offset, numel) of a piece."""
GATHER_BYTES = 64 << 20
"""About as many bytes of full parameters are put together at once."""


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + numel) of a parameter, flattened in row-major order.

    weights, exp_avg and exp_avg_sq are live 1-D float32 views of the master weights and Adam's moments.
    """

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    offset: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def numel(self) -> int:
        """Elements of the piece, not of the parameter."""
        return self.weights.numel()

    @property
    def address(self) -> Address:
        """(name, offset, numel): which elements of which parameter these are."""
        return self.name, self.offset, self.numel


def shares(numels: dict[str, int], rank: int, size: int) -> list[Address]:
    """A rank's share when all parameters, end to end, are cut into equal parts."""
    total = sum(numels.values())
    low, high = rank * total // size, (rank + 1) * total // size
    found, start = [], 0
    for name, numel in numels.items():
        first, last = max(low, start), min(high, start + numel)
        if first < last:
            found.append((name, first - start, last - first))
        start += numel
    return found


@dataclass(frozen=True)
class Ownership:
    """Who owns which elements, as every rank knows it."""

    shapes: dict[str, torch.Size]
    """Of every parameter, in the same order on every rank."""
    addresses: list[list[Address]]
    """Of every rank's pieces."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], world: World) -> "Ownership":
        """A collective."""
        ranks = gather_objects(world, [(piece.address, tuple(piece.shape)) for piece in pieces])
        shapes = {address[0]: torch.Size(shape) for owned in ranks for address, shape in owned}
        return cls(shapes, [[address for address, _ in owned] for owned in ranks])


def gather_full(
    tensors: Sequence[Tensor], ownership: Ownership, world: World, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full float32 tensor) of every parameter, from every rank's 1-D tensors.

    tensors: this rank's, aligned with its pieces. A collective: every rank has to exhaust the iterator. Rank 0
    gets the tensors, in host memory; the others get nothing, or the same with `everywhere`. About GATHER_BYTES
    are in flight on the device, however large the model is.
    """
    shapes = ownership.shapes
    for names in _buckets(shapes):
        full = {}
        if everywhere or world.is_first:
            full = {name: torch.empty(shapes[name], dtype=torch.float32) for name in names}
        for owner, owned in enumerate(ownership.addresses):
            parts = [(i, address) for i, address in enumerate(owned) if address[0] in names]
            if not parts:
                continue
            mine = owner == world.rank
            flat = torch.cat([tensors[i] for i, _ in parts]).to(world.device) if mine else None
            flat = _transfer(flat, sum(address[2] for _, address in parts), owner, world, everywhere)
            if flat is not None and full:
                flat = flat.cpu()
                for (_, (name, offset, numel)), values in zip(parts, flat.split([a[2] for _, a in parts]), strict=True):
                    full[name].view(-1)[offset : offset + numel] = values
        yield from full.items()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable and in place."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def _transfer(flat: Tensor | None, numel: int, owner: int, world: World, everywhere: bool) -> Tensor | None:
    """The owner's values, given on the owner alone: on rank 0, or on all ranks; None where they aren't wanted."""
    if world.size == 1 or (owner == 0 and not everywhere):
        return flat
    if everywhere or world.is_first:
        received = flat if flat is not None else torch.empty(numel, dtype=torch.float32, device=world.device)
        if everywhere:
            dist.broadcast(received, src=owner)
        else:
            dist.recv(received, src=owner)
        return received
    if flat is not None:
        dist.send(flat, dst=0)
    return None


def _buckets(shapes: dict[str, torch.Size]) -> Iterator[dict[str, None]]:
    """Consecutive names (as an ordered set) whose parameters take about GATHER_BYTES."""
    names: dict[str, None] = {}
    size = 0
    for name, shape in shapes.items():
        names[name] = None
        size += 4 * shape.numel()
        if size >= GATHER_BYTES:
            yield names
            names, size = {}, 0
    if names:
        yield names
