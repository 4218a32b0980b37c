"""Where each element of a state is stored: what a reader asks, to plan what it fetches."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from ddpm_dist.state.format import ELEMENT_BYTES, Manifest


@dataclass(frozen=True)
class Segment:
    """Bytes [start, start + size) of a rank's stream, that belong at `target` of what is wanted (in bytes)."""

    rank: int
    start: int
    size: int
    target: int


class Source:
    """Where each element of each kind is stored, for planning reads; by arithmetic where the manifest has a cut."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._kinds = {kind: number for number, kind in enumerate(manifest.kinds)}
        self._elements = manifest.elements()
        self._owned: dict[str, list[tuple[int, int, int, int]]] = {}
        """name -> (offset, numel, rank, first element in that rank's kind), by offset."""
        if manifest.cut is None:
            self._owned = {name: [] for name in manifest.shapes}
            for rank, part in enumerate(manifest.parts):
                starts = accumulate((numel for _, _, numel in part.pieces or ()), initial=0)
                for (name, offset, numel), start in zip(part.pieces or (), starts, strict=False):
                    self._owned[name].append((offset, numel, rank, start))
            for owned in self._owned.values():
                owned.sort()

    def segments(self, kind: str, name: str, offset: int, numel: int) -> Iterator[Segment]:
        """The stored ranges that make up elements [offset, offset + numel) of a parameter, in order."""
        for at, length, rank, start in self._owners(name, offset, numel):
            element = self._kinds[kind] * self._elements[rank] + start
            yield Segment(rank, ELEMENT_BYTES * element, ELEMENT_BYTES * length, ELEMENT_BYTES * (at - offset))

    def _owners(self, name: str, offset: int, numel: int) -> Iterator[tuple[int, int, int, int]]:
        """As `Cut.owners`."""
        if self.manifest.cut is not None:
            yield from self.manifest.cut.owners(name, offset, numel)
            return
        owned, end = self._owned[name], offset + numel
        for at, length, rank, start in owned[max(0, bisect_right(owned, (offset, float("inf"))) - 1) :]:
            low, high = max(at, offset), min(at + length, end)
            if at >= end:
                return
            if low < high:
                yield low, high - low, rank, start + low - at
