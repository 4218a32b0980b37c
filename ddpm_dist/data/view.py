"""One global batch, looked at: what a training with the same settings takes at a step, without a loader."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ddpm_dist.config import default_streams
from ddpm_dist.data.decode import BadSampleError, Pixels, decode
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.loader import open_urls
from ddpm_dist.data.order import Order
from ddpm_dist.data.stream import substitute

log = logging.getLogger(__name__)

THREADS = 16


class BatchView:
    """The batches of a mix {URL: weight}, by step; nothing is replayed. streams None: the default of that batch.

    indexes: {URL: folder of its index} of the sets whose index isn't with the shards.
    """

    def __init__(
        self,
        urls: Mapping[str, float],
        *,
        seed: int,
        global_batch: int,
        streams: int | None,
        shuffle_block: int,
        exclude: Sequence[str] = (),
        indexes: Mapping[str, str] | None = None,
    ) -> None:
        sets, weights = open_urls(dict(urls), exclude, indexes)
        self.global_batch = global_batch
        self._readers = [ShardReader(index) for index in sets]
        self._order = Order(
            [index.counts for index in sets],
            seed=seed,
            global_batch=global_batch,
            streams=streams or default_streams(global_batch),
            shuffle_block=shuffle_block,
            weights=weights,
        )

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to; both count from 0."""
        return self._order.epoch(step)

    def samples(self, step: int) -> list[tuple[str, Pixels]]:
        """Key and [H, W, 3] uint8 image of each place of a batch, in order.

        A sample that can't be decoded is named in the log; the one that the training takes instead stands in its place.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda place: self._at(step, place), range(self.global_batch)))

    def _at(self, step: int, place: int) -> tuple[str, Pixels]:
        found = self._order.at(step, place, place + 1)
        sample = self._readers[int(found.set[0])].sample(int(found.shard[0]), int(found.sample[0]))
        try:
            return sample.key, decode(sample.image, None, 3)
        except BadSampleError as error:
            instead, image = substitute(self._order, self._readers, step, place, None, 3)
            log.warning("place %d: %s can't be decoded (%s); %s took its place", place, sample.key, error, instead.key)
            return instead.key, image
