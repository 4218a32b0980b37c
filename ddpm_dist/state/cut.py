"""Which rank holds which elements, where it is arithmetic: pure functions of (rule, number of ranks, shapes).

Of 16,384 ranks under ZeRO-3 the pieces are millions; written out they were most of a manifest, and read by every rank.
The three rules are DeepSpeed's, and our own where all is everywhere; a rank holds each rule to what it really owns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.engine import Address

Rule = Literal["even", "flat", "each"]
RULES: dict[int, Rule] = {0: "even", 1: "flat", 2: "flat", 3: "each"}
"""By ZeRO stage."""
ALIGNED = 2
"""DeepSpeed pads the flat parameters of stages 1 and 2 to a multiple of so many elements for each rank."""


@dataclass(frozen=True)
class Cut:
    """All parameters, cut for a number of ranks.

    even: end to end, rank r has elements [r·N/W, (r+1)·N/W). flat: end to end, each rank has as many, the last ones
    fewer. each: every parameter for itself, each rank has ⌈n/W⌉ elements of it, the last ones fewer or none.
    """

    rule: Rule
    ranks: int
    numels: Mapping[str, int]
    """Elements of each parameter, in the network's order."""
    _starts: dict[str, int] = field(init=False, compare=False, repr=False)
    """Of each parameter among all, end to end."""
    _bounds: NDArray[np.int64] = field(init=False, compare=False, repr=False)
    """[ranks + 1] first element of each rank, where parameters lie end to end."""
    _known: dict[int, dict[str, int]] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        ends = np.cumsum(list(self.numels.values()), dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        object.__setattr__(self, "_starts", dict(zip(self.numels, [0, *ends.tolist()], strict=False)))
        ranks = np.arange(self.ranks + 1, dtype=np.int64)
        part = -(-total // (ALIGNED * self.ranks)) * ALIGNED
        bounds = ranks * total // self.ranks if self.rule == "even" else np.minimum(ranks * part, total)
        object.__setattr__(self, "_bounds", bounds)

    def pieces(self, rank: int) -> list[Address]:
        """What a rank owns, in the network's order."""
        found = []
        for name, numel in self.numels.items():
            low, high = self._range(name, numel, rank)
            if low < high:
                found.append((name, low, high - low))
        return found

    def elements(self) -> NDArray[np.int64]:
        """[ranks] elements that each rank owns."""
        if self.rule != "each":
            return np.diff(self._bounds)
        ranks = np.arange(self.ranks, dtype=np.int64)
        found = np.zeros(self.ranks, np.int64)
        for numel in self.numels.values():
            each = -(-numel // self.ranks)
            found += np.clip(numel - ranks * each, 0, each)
        return found

    def owners(self, name: str, offset: int, numel: int) -> Iterator[tuple[int, int, int, int]]:
        """(first element, number, rank, where that is among the rank's own) of what holds a range, in order."""
        end = offset + numel
        while offset < end:
            if self.rule == "each":
                each = -(-self.numels[name] // self.ranks)
                rank = offset // each
                stop, start = min(end, (rank + 1) * each), self._firsts(rank)[name] + offset - rank * each
            else:
                first = self._starts[name]
                rank = int(np.searchsorted(self._bounds, first + offset, side="right")) - 1
                stop = min(end, int(self._bounds[rank + 1]) - first)
                start = first + offset - int(self._bounds[rank])
            yield offset, stop - offset, rank, start
            offset = stop

    def _range(self, name: str, numel: int, rank: int) -> tuple[int, int]:
        if self.rule == "each":
            each = -(-numel // self.ranks)
            return min(numel, rank * each), min(numel, (rank + 1) * each)
        first = self._starts[name]
        low, high = int(self._bounds[rank]) - first, int(self._bounds[rank + 1]) - first
        return max(0, low), min(numel, high)

    def _firsts(self, rank: int) -> dict[str, int]:
        """Where each parameter's elements begin among a rank's own."""
        found = self._known.get(rank)
        if found is None:
            found, start = {}, 0
            for name, numel in self.numels.items():
                low, high = self._range(name, numel, rank)
                found[name] = start
                start += high - low
            self._known[rank] = found
        return found


def cut_of(stage: int, ranks: int, shapes: Mapping[str, Sequence[int]]) -> Cut:
    """The cut of a ZeRO stage."""
    return Cut(RULES[stage], ranks, {name: math.prod(shape) for name, shape in shapes.items()})
