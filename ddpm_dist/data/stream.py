"""From an order and shards to decoded places: blocks are fetched ahead, dealt, decoded, put into a batch."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.data.buffers import Buffers
from ddpm_dist.data.daemons import DaemonPool
from ddpm_dist.data.decode import BadSampleError, Pixels, decode, decode_into
from ddpm_dist.data.fetch import LoadedExtent, Sample, ShardReader
from ddpm_dist.data.index import NO_LABEL, load_index
from ddpm_dist.data.order import Block, Extent, Order, share_of
from ddpm_dist.errors import BadSamplesError

log = logging.getLogger(__name__)

ITERATE_BYTES = 2**24


@dataclass(frozen=True)
class Part:
    """Consecutive places of a batch, decoded."""

    step: int
    images: Pixels
    """[places, H, W, C] uint8."""
    labels: NDArray[np.int64]
    """[places]; −1 without a label."""
    keys: list[str]
    ids: NDArray[np.int64]
    """[places] number of each sample among all sets."""
    epochs: NDArray[np.int64]
    """[places] epoch of each sample's set."""
    bad: dict[str, int]
    """Samples of these places that couldn't be decoded, by cause."""


class LoadedBlock:
    """A block in memory: the samples that are still to be dealt.

    The extents' bytes are let go, with the headers and the padding between images, and each sample as it is dealt: on
    average a block takes half of what was read for it, or less.
    """

    def __init__(self, block: Block, extents: Sequence[LoadedExtent], dealt: Sequence[int], nbytes: int) -> None:
        self.block, self.nbytes = block, nbytes
        samples = [extent[i] for extent in extents for i in range(len(extent))]
        self._samples = {place: samples[i] for place, i in enumerate(dealt)}

    def deal(self, first: int, last: int) -> list[Sample]:
        """Its first-th to (last−1)-th dealt sample, each once."""
        return [self._samples.pop(place) for place in range(first, last)]


class Window:
    """The blocks that some places need now, and those that they need soon, fetched by threads.

    Blocks are asked for in the order of need; early ones about two for each thread, and only while all blocks
    together stay within `budget` bytes. What has to come before the first batch is one block of each stream.
    """

    def __init__(
        self,
        order: Order,
        readers: Sequence[ShardReader],
        places: tuple[int, int],
        start_step: int,
        threads: int,
        budget: int,
    ) -> None:
        self._order, self._readers, self._budget = order, readers, budget
        self._runs = order.runs(*places)
        largest = max(min(s.shuffle_block, s.samples) for s in order.sets)
        # For each thread a block under way and one that is ready, since a store's answers take uneven times.
        self._ahead = 1 + 2 * threads * largest // max(1, places[1] - places[0])
        self._upcoming = order.blocks(*places, start_step)
        self._next = next(self._upcoming)
        self._waiting: dict[tuple[int, int], deque[tuple[Block, Future[LoadedBlock]]]] = {
            (d, stream): deque() for d, stream, _, _ in self._runs
        }
        self._current: dict[tuple[int, int], LoadedBlock] = {}
        self._bytes = 0
        self._pool = DaemonPool(threads, "data-fetch")

    def samples(self, step: int) -> Iterator[Sample]:
        """The samples of the places at a step, in the order of the places; steps only rise."""
        for name, loaded in list(self._current.items()):
            if loaded.block.last_step < step:
                self._drop(name)
        self._fetch_until(step, step)
        for d, stream, low, high in self._runs:
            set_order = self._order.sets[d]
            epoch, t = divmod(step, set_order.steps_per_epoch)
            base = t * set_order.width(stream)
            position, stop = base + low, base + high
            while position < stop:
                loaded = self._block((d, stream), epoch, position)
                end = min(stop, loaded.block.start + loaded.block.count)
                yield from loaded.deal(position - loaded.block.start, end - loaded.block.start)
                position = end
        self._fetch_until(step + self._ahead, step)  # last, so that nothing delays what is needed now

    def close(self) -> None:
        self._pool.close()

    def _block(self, stream: tuple[int, int], epoch: int, position: int) -> LoadedBlock:
        current = self._current.get(stream)
        while current is None or current.block.epoch != epoch or position >= current.block.start + current.block.count:
            if current is not None:
                self._drop(stream)
            current = self._current[stream] = self._waiting[stream].popleft()[1].result()
        return current

    def _drop(self, stream: tuple[int, int]) -> None:
        self._bytes -= self._current.pop(stream).nbytes

    def _fetch_until(self, last_step: int, step: int) -> None:
        """Asks for the blocks that are first needed up to `last_step`; those after `step` only within the budget."""
        while self._next.first_step <= last_step:
            block = self._next
            extents = self._order.sets[block.set].extents(block)
            nbytes = sum(self._readers[block.set].bytes_of(extent) for extent in extents)
            if block.first_step > step and self._bytes + nbytes > self._budget:
                return
            self._bytes += nbytes
            future = self._pool.submit(self._load, block, extents, nbytes)
            self._waiting[block.set, block.stream].append((block, future))
            self._next = next(self._upcoming)

    def _load(self, block: Block, extents: Sequence[Extent], nbytes: int) -> LoadedBlock:
        reader = self._readers[block.set]
        loaded = [reader.load(extent) for extent in extents]
        return LoadedBlock(block, loaded, self._order.sets[block.set].deal(block).tolist(), nbytes)


def parts(
    order: Order,
    readers: Sequence[ShardReader],
    places: tuple[int, int],
    start_step: int,
    *,
    size: int,
    channels: int,
    threads: int,
    budget: int,
) -> Iterator[Part]:
    """What stands at places first..last−1 of every batch from a step on, without end."""
    window = Window(order, readers, places, start_step, threads, budget)
    buffers = Buffers((places[1] - places[0], size, size, channels))
    step = start_step
    try:
        while True:
            yield _decode_places(order, readers, places, step, list(window.samples(step)), buffers.take())
            step += 1
    finally:
        window.close()


def _decode_places(
    order: Order,
    readers: Sequence[ShardReader],
    places: tuple[int, int],
    step: int,
    samples: list[Sample],
    images: Pixels,
) -> Part:
    bad: Counter[str] = Counter()
    bad_places: list[int] = []
    for i, sample in enumerate(samples):
        try:
            decode_into(sample.image, images[i])
        except BadSampleError as error:
            log.warning("data: sample %s can't be decoded (%s); another takes its place", sample.key, error)
            bad[error.cause] += 1
            bad_places.append(i)
    for i in bad_places:
        samples[i], images[i] = substitute(order, readers, step, places[0] + i, *images.shape[2:])
    return Part(
        step,
        images,
        np.array([sample.label for sample in samples], np.int64),
        [sample.key for sample in samples],
        np.array([sample.id for sample in samples], np.int64),
        _epochs(order, places, step),
        dict(bad),
    )


def substitute(
    order: Order, readers: Sequence[ShardReader], step: int, place: int, size: int | None, channels: int
) -> tuple[Sample, Pixels]:
    """The next decodable sample of the batch after a place, around its end if need be (contract 1).

    It is looked up and not taken from what this rank has, since it can be another rank's.
    """
    for offset in range(1, order.global_batch):
        other = (place + offset) % order.global_batch
        found = order.at(step, other, other + 1)
        sample = readers[int(found.set[0])].sample(int(found.shard[0]), int(found.sample[0]))
        try:
            return sample, decode(sample.image, size, channels)
        except BadSampleError:
            continue
    raise BadSamplesError(f"step {step}: none of the {order.global_batch} samples of the batch can be decoded")


def _epochs(order: Order, places: tuple[int, int], step: int) -> NDArray[np.int64]:
    parts = [np.full(high - low, step // order.sets[d].steps_per_epoch) for d, _, low, high in order.runs(*places)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class DecodedSample:
    """One decoded image of a data set."""

    key: str
    image: Pixels
    """[C, H, W] uint8."""
    label: int | None


def iterate(
    url: str,
    part: tuple[int, int] = (0, 1),
    image_size: int | None = None,
    channels: int | None = None,
    at: str | None = None,
) -> Iterator[DecodedSample]:
    """All samples of a data set in the order of its index, each once, or the k-th of n equal parts of them.

    at: folder of the index, if it isn't with the shards.
    Made for evaluation: a sample that can't be decoded is a BadSamplesError, since a measure over
    another set would be another measure.
    """
    for sample in iterate_raw(url, part, at):
        try:
            image = decode(sample.image, image_size, channels)
        except BadSampleError as error:
            raise BadSamplesError(f"{url}: sample {sample.key} can't be decoded: {error}") from None
        label = sample.label if sample.label != NO_LABEL else None
        yield DecodedSample(sample.key, np.ascontiguousarray(image.transpose(2, 0, 1)), label)


def iterate_raw(url: str, part: tuple[int, int] = (0, 1), at: str | None = None) -> Iterator[Sample]:
    """As `iterate`, not decoded."""
    index = load_index(url, at=at)
    reader = ShardReader(index)
    position, last = share_of(part[0], part[1], index.num_samples)
    ends = np.cumsum(index.counts)
    while position < last:
        shard = int(np.searchsorted(ends, position, side="right"))
        info = index.shards[shard]
        start = position - int(ends[shard]) + info.samples
        at_once = max(1, ITERATE_BYTES * info.samples // info.bytes)
        loaded = reader.load(Extent(shard, start, min(at_once, info.samples - start, last - position)))
        for i in range(len(loaded)):
            yield loaded[i]
        position += len(loaded)
