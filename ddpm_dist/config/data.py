"""`data:`, the set of images and how it is read."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Count, Fraction, Free, Positive, Schedule, Section, Url


class DataConfig(Section):
    """Which images, what the network sees of them, and how they are read."""

    url: Free[Url | Annotated[dict[Url, Annotated[float, Field(gt=0)]], Field(min_length=1)]]
    """Folder with shards and index, or a mapping of such folders to mixing weights."""
    index: Free[Url | dict[Url, Url] | None] = None
    """Folder with the index, where it isn't with the shards (ddpm-shards index --index); of a mix, {set: folder}."""
    image_size: Positive
    """Height and width in pixels that the network sees; other sizes are resized and centre-cropped."""
    channels: Literal[1, 3] = 3
    """Grey or RGB, to which all images are converted."""
    flip: bool = False
    """Random horizontal flips, by (seed, epoch, sample)."""
    streams: Positive | None = None
    """Canonical streams S that the shards are dealt to; divides the global batch. A rank reads whole streams: with more
    workers than streams, it reads samples that others use. Default: the largest divisor of the global batch up to 32 or
    a quarter of it, whichever is more; a run that was begun when it was 32 alone keeps that."""
    shuffle_block: Positive = 4096
    """Samples of a stream that are permuted together."""
    workers: Free[Count] = 0
    """Loader processes per rank; 0 decodes in a thread. Default: 0 on a CPU; on a GPU, whose host a thread would hold
    up, the worker's CPUs (cluster.cpus_per_worker) but one, at least 1 and at most 4."""
    read_ahead: Free[Positive] = 4
    """Objects fetched at once by a rank."""
    buffer_bytes: Free[Positive] = 2**31
    """Most memory of a rank for shuffle blocks: one of each of its streams and one more have to fit (checked at the
    start, at the smallest number of workers); what is left is used to read ahead."""
    cache_dir: Free[str | None] = None
    """Local folder for fetched shards; none by default."""
    cache_bytes: Free[Positive] = 2**36
    max_bad_fraction: Free[Fraction] = 0.0
    """Share of samples that may fail to decode before the run stops."""
    exclude_shards: Schedule[tuple[str, ...]] = ()
    """Names of shards to leave out; this makes a new content id, recorded with its step."""


MOST_STREAMS_BEFORE = 32


def default_streams(global_batch: int) -> int:
    """The largest divisor of the global batch up to 32 or a quarter of it: with 4 images a rank, none is read twice."""
    return _largest_divisor(global_batch, max(MOST_STREAMS_BEFORE, global_batch // 4))


def streams_before_0_2(global_batch: int) -> int:
    """What `null` meant in configurations that versions before 0.2 saved."""
    return _largest_divisor(global_batch, MOST_STREAMS_BEFORE)


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def check_streams(streams: int, batch: int) -> None:
    """Streams that divide the global batch; else ValueError."""
    if batch % streams:
        raise ValueError(f"data.streams: {streams} doesn't divide train.global_batch: {batch}")
