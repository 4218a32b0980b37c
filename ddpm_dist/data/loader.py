"""A rank's batches: the same global batches at any number of ranks and workers, from any step on."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng, storage
from ddpm_dist.config import Config
from ddpm_dist.data.cache import DiskCache
from ddpm_dist.data.daemons import in_background
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.index import LYING, DataIndex, load_index
from ddpm_dist.data.order import Order, share_of
from ddpm_dist.data.stream import Part, parts
from ddpm_dist.data.workers import worker_parts
from ddpm_dist.errors import BadSamplesError, ConfigError

log = logging.getLogger(__name__)

BATCHES_AHEAD = 4
"""Most finished batches that wait for the training loop."""
BYTES_AHEAD = 2**25
"""Most bytes of them; one batch may always wait."""


@dataclass(frozen=True)
class Batch:
    """A rank's places [rB/W, (r+1)B/W) of a global batch."""

    step: int
    epoch: int
    images: Tensor
    """[B/W, C, H, W] uint8, flips applied. Channels lie last in memory, as the decoders leave them: moving
    them costs more than decoding. `.to(dtype, memory_format=torch.contiguous_format)` moves them for free."""
    labels: Tensor | None
    """[B/W] int64."""
    keys: list[str]
    bad: dict[str, int]
    """Samples that this loader couldn't decode so far, by cause."""


class Loader:
    """The batches of one rank. It has no state but the step: `batches(step)` starts anywhere at the same cost."""

    def __init__(self, cfg: Config, rank: int, world: int, pinned: bool = False) -> None:
        """pinned: batches lie in memory that a GPU reads by itself."""
        batch = cfg.train.global_batch
        if batch % world:
            raise ConfigError(f"train.global_batch: {batch} can't be shared by {world} ranks")
        self._cfg, self._pinned = cfg, pinned
        self._rank, self._world = rank, world
        self._indexes, weights = open_sets(cfg)
        self._order = make_order(cfg, self._indexes, weights)
        self._places = share_of(rank, world, batch)
        firsts = np.concatenate(([0], np.cumsum([index.num_samples for index in self._indexes])))
        cache = DiskCache(cfg.data.cache_dir, cfg.data.cache_bytes) if cfg.data.cache_dir else None
        self._readers = [
            ShardReader(index, int(first), cache) for index, first in zip(self._indexes, firsts, strict=False)
        ]
        self.content_id = content_id(self._indexes, weights)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.num_classes = max((index.num_classes or 0 for index in self._indexes), default=0) or None
        self._labelled = all(index.num_classes for index in self._indexes)
        _check_classes(cfg.model.num_classes, self.num_classes if self._labelled else None)
        self._open: list[Iterator[Batch]] = []
        check_memory(cfg, self._order, self._indexes)

    def epoch(self, step: int) -> int:
        """Epoch of a step; of a mix: how often as many samples were dealt as its sets have together."""
        return self._order.epoch(step)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches from a step on, over all epochs, without end."""
        if self._places[0] == 0:
            _tell(self._indexes)
        if self._rank == 0 and (remark := reading_twice(self._cfg, self._order, self._world)):
            log.warning("%s", remark)
        found = in_background(lambda: self._finished(start_step), self._batches_ahead())
        self._open.append(found)
        return found

    def close(self) -> None:
        """Ends the threads and processes of all iterators."""
        for iterator in self._open:
            iterator.close()  # type: ignore[attr-defined]
        self._open.clear()

    def _batches_ahead(self) -> int:
        data = self._cfg.data
        nbytes = (self._places[1] - self._places[0]) * data.image_size**2 * data.channels
        return max(1, min(BATCHES_AHEAD, BYTES_AHEAD // nbytes))

    def _finished(self, start_step: int) -> Iterator[Batch]:
        data, bad, seen = self._cfg.data, Counter[str](), 0
        allowed_at_least = self._order.samples * (self._places[1] - self._places[0]) // self._order.global_batch
        for part in self._parts(start_step):
            bad.update(part.bad)
            seen += len(part.keys)
            if bad and bad.total() > data.max_bad_fraction * max(seen, allowed_at_least):
                causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in bad.most_common())
                raise BadSamplesError(
                    f"data.max_bad_fraction: {bad.total()} of {seen} samples couldn't be decoded ({causes}), more "
                    f"than the share {data.max_bad_fraction}; ddpm-shards verify lists them"
                )
            ready = [self._batch(part, dict(bad))]
            del part  # or each batch stays in memory until the next is made: 25 MB for 128 images of 256 pixels
            yield ready.pop()

    def _parts(self, start_step: int) -> Iterator[Part]:
        data = self._cfg.data
        if data.workers:
            return worker_parts(self._order, self._readers, self._places, start_step, data)
        return parts(
            self._order,
            self._readers,
            self._places,
            start_step,
            size=data.image_size,
            channels=data.channels,
            threads=data.read_ahead,
            budget=data.buffer_bytes,
        )

    def _batch(self, part: Part, bad: dict[str, int]) -> Batch:
        if self._cfg.data.flip:
            flip(part, self._cfg.run.seed)
        images = torch.from_numpy(part.images).permute(0, 3, 1, 2)
        labels = torch.from_numpy(part.labels) if self._labelled else None
        if self._pinned:
            images = images.pin_memory()
            labels = labels.pin_memory() if labels is not None else None
        return Batch(part.step, self.epoch(part.step), images, labels, part.keys, bad)


def _tell(indexes: Iterable[DataIndex]) -> None:
    """Says what of the sets is trained on otherwise than it was seen."""
    for index in indexes:
        if lying := index.about.get(LYING):
            log.warning(
                "data: %d of %d images of %s aren't upright by their EXIF orientation, and are trained on as they lie "
                "(ddpm-shards make turns them)",
                lying,
                index.num_samples,
                storage.redact(index.url),
            )


def _check_classes(wanted: int | None, there: int | None) -> None:
    """A conditional network needs labels, and a row for each of them."""
    if wanted is None:
        return
    if there is None:
        raise ConfigError(f"model.num_classes: {wanted}, but the data has no labels; leave the key out")
    if there > wanted:
        raise ConfigError(f"model.num_classes: {wanted}, but the labels of the data go up to {there - 1}; use {there}")


def open_sets(cfg: Config) -> tuple[list[DataIndex], list[float]]:
    """The indexes of the data sets that a configuration mixes, without excluded shards, and their weights.

    They are ordered by content, so that a set may move to another URL.
    """
    urls = {cfg.data.url: 1.0} if isinstance(cfg.data.url, str) else cfg.data.url
    return open_urls(urls, cfg.data.exclude_shards, cfg.data.index)


def open_urls(
    urls: Mapping[str, float], exclude_shards: Iterable[str] = (), indexes: str | Mapping[str, str] | None = None
) -> tuple[list[DataIndex], list[float]]:
    """As `open_sets`, of {URL: weight}; indexes: the folder of the set's index, or {URL: folder} for some of them."""
    at = _folders_of_indexes(urls, indexes)
    names = {url: "data.index" if url in at else "data.url" for url in urls}
    found = [(load_index(url, names[url], at.get(url)), weight) for url, weight in urls.items()]
    _refuse_the_same([index for index, _ in found])
    excluded = set(exclude_shards)
    unknown = excluded - {shard.name for index, _ in found for shard in index.shards}
    if unknown:
        raise ConfigError(f"data.exclude_shards: no shard is called {sorted(unknown)[0]!r}")
    found = [(index.without(excluded & {s.name for s in index.shards}), weight) for index, weight in found]
    empty = next((index for index, _ in found if not index.num_samples), None)
    if empty:
        raise ConfigError(
            f"data.exclude_shards: leaves out all shards of {storage.redact(empty.url)}; leave the set out"
        )
    found.sort(key=lambda pair: pair[0].content_id)
    return [index for index, _ in found], [weight for _, weight in found]


def _refuse_the_same(indexes: Iterable[DataIndex]) -> None:
    """ConfigError for a set that is named twice, under another URL or another spelling of it."""
    seen: dict[str, str] = {}
    for index in indexes:
        other = seen.setdefault(index.content_id, index.url)
        if other != index.url:
            raise ConfigError(
                f"data.url: {storage.redact(other)} and {storage.redact(index.url)} hold the same shards; name the set "
                f"once, with the weight that it is to have"
            )


def _folders_of_indexes(urls: Mapping[str, float], indexes: str | Mapping[str, str] | None) -> Mapping[str, str]:
    if isinstance(indexes, str):
        if len(urls) > 1:
            raise ConfigError(
                f"data.index: one folder for {len(urls)} sets; write {{set: folder}} for those that need it"
            )
        return dict.fromkeys(urls, indexes)
    unknown = sorted(set(indexes or ()) - set(urls))
    if unknown:
        raise ConfigError(f"data.index: {storage.redact(unknown[0])} is not a set of data.url")
    return indexes or {}


def make_order(cfg: Config, indexes: list[DataIndex], weights: list[float]) -> Order:
    return Order(
        [index.counts for index in indexes],
        seed=cfg.run.seed,
        global_batch=cfg.train.global_batch,
        streams=cfg.streams,
        shuffle_block=cfg.data.shuffle_block,
        weights=weights,
    )


def content_id(indexes: list[DataIndex], weights: list[float]) -> str:
    """Of one set its own; of a mix a hash of all and of their weights."""
    if len(indexes) == 1:
        return indexes[0].content_id
    total = sum(weights)
    text = "\n".join(f"{index.content_id} {weight / total!r}" for index, weight in zip(indexes, weights, strict=True))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_memory(cfg: Config, order: Order, indexes: list[DataIndex]) -> None:
    """ConfigError if the blocks of a rank don't fit data.buffer_bytes at the smallest world size.

    A rank holds one block of each stream that it owns, and needs room for one more; whatever else fits is
    used to fetch ahead.
    """
    world = cfg.worker_range[0]
    needed = largest = 0
    for rank in range(min(world, 64)):
        runs = order.runs(*share_of(rank, world, order.global_batch))
        samples = [order.sets[d].largest_block(stream) for d, stream, _, _ in runs]
        sizes = [n * indexes[run[0]].bytes_per_sample for n, run in zip(samples, runs, strict=True)]
        needed = max(needed, int(sum(sizes) + max(sizes)))
        largest = max(largest, *samples)
    if needed > cfg.data.buffer_bytes:
        fits = max(1, largest * cfg.data.buffer_bytes // needed)
        raise ConfigError(
            f"data.shuffle_block: {cfg.data.shuffle_block} samples of each stream of a rank are {needed} bytes at "
            f"{world} workers, data.buffer_bytes allows {cfg.data.buffer_bytes}; use a block of {fits}, fewer "
            f"data.streams than {order.streams}, more bytes, or more workers"
        )


def reading_twice(cfg: Config, order: Order, world: int) -> str | None:
    """What it costs that streams have several readers, and what would mend it; None where each has one."""
    if world <= order.streams:
        return None
    places = share_of(0, world, order.global_batch)
    read = sum(order.sets[d].width(stream) for d, stream, _, _ in order.runs(*places))
    return (
        f"data.streams: {order.streams} streams for {world} workers, each of which reads whole streams: "
        f"{read / (places[1] - places[0]):.3g} samples come from the store for each that is used. The order of a run "
        f"rests on this number; a new run with data.streams={max(world, cfg.worker_range[1])} reads each once"
    )


def flip(part: Part, seed: int) -> None:
    """Mirrors half of the images in place, by (seed, epoch, sample): contract 2."""
    for epoch in np.unique(part.epochs):
        here = np.flatnonzero(part.epochs == epoch)
        draw = rng.uniform(seed, rng.Purpose.FLIP, torch.from_numpy(part.ids[here]), step=int(epoch)).numpy()
        mirrored = here[draw < 0.5]
        part.images[mirrored] = part.images[mirrored][:, :, ::-1]
