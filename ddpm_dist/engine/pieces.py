"""Pieces: which elements of which parameter a rank owns, whatever the ZeRO stage, and how they come together.

Over all ranks the pieces partition every parameter, so what is done to pieces (moving averages, saving,
loading) is done to each element by one rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist.engine.world import World

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


@torch.no_grad()
def gather_full(
    tensors: Sequence[Tensor],
    addresses: Sequence[Address],
    shapes: Mapping[str, torch.Size],
    world: World,
    everywhere: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full float32 tensor) of every parameter, from every rank's 1-D tensors.

    tensors, addresses: this rank's, aligned with its pieces. shapes: of all parameters, in one order on all ranks.
    A collective: every rank has to exhaust the iterator. Rank 0 gets the tensors, in host memory; the others get
    nothing, or the same with `everywhere`. About GATHER_BYTES are in flight on the device, however large the model is.

    Each element has one owner, so the sum over the ranks of its bits, where all others have zero, is these bits (of
    floats it wouldn't be: −0 + 0 is 0). One reduction, whatever the number of ranks, and nobody has to know who owns
    what.
    """
    owned: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, offset, _), tensor in zip(addresses, tensors, strict=True):
        owned.setdefault(name, []).append((offset, tensor))
    for names in _buckets(shapes):
        numels = [shapes[name].numel() for name in names]
        flat = torch.zeros(sum(numels), dtype=torch.float32, device=world.device)
        for name, full in zip(names, flat.split(numels), strict=True):
            for offset, tensor in owned.get(name, ()):
                full[offset : offset + tensor.numel()] = tensor
        if world.size > 1 and everywhere:
            dist.all_reduce(flat.view(torch.int32))
        elif world.size > 1:
            dist.reduce(flat.view(torch.int32), dst=0)
        if everywhere or world.is_first:
            for name, full in zip(names, flat.split(numels), strict=True):
                yield name, full.view(shapes[name]).to("cpu", copy=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable and in place."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def _buckets(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Consecutive names whose parameters take about GATHER_BYTES."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 4 * shape.numel()
        if size >= GATHER_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names
