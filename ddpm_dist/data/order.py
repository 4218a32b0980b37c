"""Which sample stands at which place of which batch: pure functions of integers.

The order depends on (sample counts of the shards, mixing weights, seed, epoch, step, global batch B,
streams S, shuffle block K). World size, rank and loader workers are not in that list: they only choose
which places somebody asks for. Nothing is replayed; any step costs the same.

In epoch e the shards are permuted by (seed, e), laid end to end, and the ring that they form is turned
by an offset of (seed, e). It is cut into S streams in proportion to the places that a stream has in a
batch; what doesn't fill a batch (N mod B samples, others in each epoch) is dropped. A stream is read in
blocks of K samples, dealt out in an order of (seed, e, stream, block). The first block of a stream is
shorter, by a golden-ratio fraction of the stream's number, so that streams turn their blocks over one
after the other and not all at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge

import numpy as np

from ddpm_dist.data.permutation import Ints, key_of, permute
from ddpm_dist.errors import ConfigError

GOLDEN_32 = 0x9E3779B9


@dataclass(frozen=True)
class Extent:
    """Consecutive samples of one shard."""

    shard: int
    first: int
    count: int


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a stream that are read together and dealt out in permuted order."""

    set: int
    """Number of the data set in the mix."""
    epoch: int
    stream: int
    number: int
    start: int
    """Position in the stream of the first sample."""
    count: int
    first_step: int
    last_step: int
    """Steps in which the first and the last of its samples are used."""


@dataclass(frozen=True)
class Places:
    """The samples at places of a batch; each field is an int64 array with one number per place."""

    set: Ints
    epoch: Ints
    shard: Ints
    sample: Ints
    """Number of the sample in its shard."""


@dataclass(frozen=True)
class _Epoch:
    """The ring of one epoch: which shard begins where."""

    shards: Ints
    starts: Ints
    """[n + 1]; the last is the number of samples."""
    turn: int


class SetOrder:
    """The order of one data set that has `places` places in each batch."""

    def __init__(
        self, counts: Sequence[int] | Ints, *, seed: int, places: int, streams: int, shuffle_block: int, number: int = 0
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.number, self.places = seed, number, places
        self.streams, self.shuffle_block = min(streams, places), shuffle_block
        self.steps_per_epoch = self.samples // places
        if not self.steps_per_epoch:
            raise ConfigError(
                f"train.global_batch: a batch takes {places} samples of a data set that has {self.samples}; "
                f"use a smaller batch or more data"
            )
        self._ring = lru_cache(maxsize=3)(self._make_ring)

    def first_place(self, stream: int) -> int:
        """First place in the batch's share of this set that belongs to a stream."""
        return stream * self.places // self.streams

    def stream_of(self, place: int) -> int:
        return ((place + 1) * self.streams - 1) // self.places

    def width(self, stream: int) -> int:
        """Places of a stream in each batch."""
        return self.first_place(stream + 1) - self.first_place(stream)

    def largest_block(self, stream: int) -> int:
        """Samples of the largest block of a stream."""
        return min(self.shuffle_block, self.steps_per_epoch * self.width(stream))

    def block_at(self, epoch: int, stream: int, position: int) -> Block:
        """The block that holds a position of a stream."""
        width = self.width(stream)
        length, size = self.steps_per_epoch * width, self.shuffle_block
        # The first block of stream k has 1..K samples, by the golden-ratio sequence; one block if all fit into it.
        head = size if length <= size else 1 + ((stream * GOLDEN_32 & 0xFFFFFFFF) * size >> 32)
        number = 0 if position < head else 1 + (position - head) // size
        start = 0 if number == 0 else head + (number - 1) * size
        count = min(length, head + number * size) - start
        base = epoch * self.steps_per_epoch
        last_step = base + (start + count - 1) // width
        return Block(self.number, epoch, stream, number, start, count, base + start // width, last_step)

    def blocks(self, stream: int, start_step: int) -> Iterator[Block]:
        """All blocks of a stream from a step on, over all epochs, without end."""
        epoch, step = divmod(start_step, self.steps_per_epoch)
        width = self.width(stream)
        position, length = step * width, self.steps_per_epoch * width
        while True:
            while position < length:
                block = self.block_at(epoch, stream, position)
                yield block
                position = block.start + block.count
            epoch, position = epoch + 1, 0

    def deal(self, block: Block) -> Ints:
        """[count]: at i, the sample of the block (0 is its first in reading order) that is dealt as its i-th."""
        return permute(np.arange(block.count), block.count, self._key(block))

    def extents(self, block: Block) -> list[Extent]:
        """What has to be read for a block, in reading order."""
        ring = self._ring(block.epoch)
        position = self._ring_position(ring, block.stream, block.start)
        left, found = block.count, []
        while left:
            slot = int(np.searchsorted(ring.starts, position, side="right")) - 1
            count = min(left, int(ring.starts[slot + 1]) - position)
            found.append(Extent(int(ring.shards[slot]), position - int(ring.starts[slot]), count))
            left -= count
            position = (position + count) % self.samples
        return found

    def at(self, step: int, first: int, last: int) -> Places:
        """The samples at places first..last−1 of this set's share of batch `step`."""
        epoch, t = divmod(step, self.steps_per_epoch)
        ring = self._ring(epoch)
        positions = np.empty(last - first, dtype=np.int64)
        for stream in range(self.stream_of(first), self.stream_of(last - 1) + 1) if last > first else ():
            begin, width = self.first_place(stream), self.width(stream)
            low, high = max(first, begin), min(last, begin + width)
            start, stop = t * width + low - begin, t * width + high - begin
            while start < stop:
                block = self.block_at(epoch, stream, start)
                end = min(stop, block.start + block.count)
                dealt = permute(np.arange(start, end) - block.start, block.count, self._key(block))
                where = low - first + np.arange(end - start)
                positions[where] = (self._ring_position(ring, stream, block.start) + dealt) % self.samples
                low, start = low + end - start, end
        slots = np.searchsorted(ring.starts, positions, side="right") - 1
        return Places(
            np.full(last - first, self.number),
            np.full(last - first, epoch),
            ring.shards[slots],
            positions - ring.starts[slots],
        )

    def _key(self, block: Block) -> int:
        return key_of(self.seed, self.number, 2, block.epoch, block.stream, block.number)

    def _ring_position(self, ring: _Epoch, stream: int, offset: int) -> int:
        return (self.steps_per_epoch * self.first_place(stream) + offset + ring.turn) % self.samples

    def _make_ring(self, epoch: int) -> _Epoch:
        n = len(self.counts)
        shards = permute(np.arange(n), n, key_of(self.seed, self.number, 0, epoch))
        starts = np.concatenate(([0], np.cumsum(self.counts[shards])))
        return _Epoch(shards, starts, key_of(self.seed, self.number, 1, epoch) % self.samples)


def share_of(rank: int, world: int, places: int) -> tuple[int, int]:
    """[first, last) of the places that a rank (or a loader worker within a rank) owns."""
    return rank * places // world, (rank + 1) * places // world


def split_by_weight(places: int, weights: Sequence[float]) -> list[int]:
    """Places of each set in a batch: proportional, at least 1 each, and `places` together (largest remainder).

    ConfigError for a weight of less than half a place: rounded up, it would be another one altogether.
    """
    total, smallest = sum(weights), min(weights)
    exact = [places * weight / total for weight in weights]
    if 2 * min(exact) < 1:
        raise ConfigError(
            f"data.url: the weight {smallest:g} of {total:g} is {min(exact):.2g} places in a batch of {places}; use a "
            f"train.global_batch of {math.ceil(total / smallest / 2)} or more, or a larger weight"
        )
    split = [max(1, math.floor(x)) for x in exact]
    for i in sorted(range(len(weights)), key=lambda i: (split[i] - exact[i], i))[: max(0, places - sum(split))]:
        split[i] += 1
    if sum(split) != places:
        raise ConfigError(
            f"data.url: weights {list(weights)} can't be had in batches of {places}: the smallest would get no place; "
            f"use a larger train.global_batch"
        )
    return split


class Order:
    """The order of a mix of data sets: a batch is set 0's places, then set 1's, …

    counts: samples of each shard, of each set. The weights are kept exactly to 1/B in every batch.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int] | Ints],
        *,
        seed: int,
        global_batch: int,
        streams: int,
        shuffle_block: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        split = split_by_weight(global_batch, weights)
        self.arguments = {
            "counts": counts,
            "seed": seed,
            "global_batch": global_batch,
            "streams": streams,
            "shuffle_block": shuffle_block,
            "weights": weights,
        }
        """What `Order(**arguments)` makes the same order of, in another process."""
        self.global_batch, self.streams = global_batch, streams
        self.firsts = [sum(split[:d]) for d in range(len(split) + 1)]
        self.sets = [
            SetOrder(
                count,
                seed=seed,
                places=n,
                streams=max(1, streams * n // global_batch),
                shuffle_block=shuffle_block,
                number=d,
            )
            for d, (count, n) in enumerate(zip(counts, split, strict=True))
        ]
        self.samples = sum(s.samples for s in self.sets)
        self.steps_per_epoch = self.samples // global_batch if len(self.sets) > 1 else self.sets[0].steps_per_epoch

    def epoch(self, step: int) -> int:
        """Epoch of a step; of a mix: how often as many samples were seen as its sets have together."""
        return step // self.steps_per_epoch

    def at(self, step: int, first: int = 0, last: int | None = None) -> Places:
        """The samples at places first..last−1 of batch `step`."""
        last = self.global_batch if last is None else last
        parts = [s.at(step, low, high) for s, low, high in self._shares(first, last)]
        return Places(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("set", "epoch", "shard", "sample"))
        )

    def runs(self, first: int, last: int) -> list[tuple[int, int, int, int]]:
        """(set, stream, low, high) of all streams that own some of the places first..last−1.

        low and high: the wanted part of the stream's places in a batch, counted from its first.
        """
        found = []
        for s, low, high in self._shares(first, last):
            for stream in range(s.stream_of(low), s.stream_of(high - 1) + 1):
                begin = s.first_place(stream)
                found.append((s.number, stream, max(low - begin, 0), min(high - begin, s.width(stream))))
        return found

    def blocks(self, first: int, last: int, start_step: int) -> Iterator[Block]:
        """All blocks that the places first..last−1 need from a step on, by the step that first needs them."""
        streams = [self.sets[d].blocks(stream, start_step) for d, stream, _, _ in self.runs(first, last)]
        return merge(*streams, key=lambda block: (block.first_step, block.set, block.stream))

    def _shares(self, first: int, last: int) -> list[tuple[SetOrder, int, int]]:
        shares = []
        for s, begin, end in zip(self.sets, self.firsts, self.firsts[1:], strict=False):
            low, high = max(first, begin), min(last, end)
            if low < high:
                shares.append((s, low - begin, high - begin))
        return shares
