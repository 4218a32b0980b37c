"""Shard j of a planned data set: a pure function of the plan, of its input and of j."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

import numpy as np

from ddpm_dist.data import decode, upright
from ddpm_dist.data.permutation import Ints, key_of, permute
from ddpm_dist.data.plans import PlanHead
from ddpm_dist.data.sources import Item, Source, SourceOptions
from ddpm_dist.data.sources.layout import is_image
from ddpm_dist.data.writer import EncodedSample
from ddpm_dist.errors import DataError, without_url_secrets

log = logging.getLogger(__name__)

EXTENSIONS = {
    "png": "png", "jpeg": "jpg", "mpo": "jpg", "webp": "webp", "gif": "gif", "bmp": "bmp", "ppm": "ppm", "tiff": "tif",
    "npy": "npy", "avif": "avif",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a data set."""

    kind: str
    options: SourceOptions
    samples: int
    samples_per_shard: int
    format: str
    """"png", "jpeg", "raw", or "keep": the input's files as they are."""
    quality: int
    channels: int | None
    shuffle_seed: int | None
    """None: the input's order."""
    skip_bad: bool = False
    """Leave out what can't be decoded."""
    run: int = 1
    """Items that the shuffle leaves together on their way to a shard; in it they are shuffled again."""

    marks: tuple[str, ...] = ()
    """What each shard is made of, by content (`identity.mark`)."""

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    @property
    def keeps(self) -> bool:
        """Whether the input's files go into the shards as they are."""
        return self.format == "keep" and self.options.size is None and self.channels is None

    @property
    def head(self) -> PlanHead:
        source = " ".join([self.kind, *self.options.inputs])
        return PlanHead(source, self.samples, self.samples_per_shard, self.skip_bad)

    def to_bytes(self) -> bytes:
        values = asdict(self)
        values["options"]["inputs"] = [without_url_secrets(place) for place in self.options.inputs]
        values["options"]["index"] = self.options.index and without_url_secrets(self.options.index)
        return (json.dumps(values, indent=1) + "\n").encode()


@dataclass
class Tally:
    """What was noticed about items on their way into a shard."""

    lying: list[str] = field(default_factory=list)
    """Names of photos whose EXIF orientation isn't upright."""
    probing: bool = False
    """Whether these are samples of the items, which are read again later: what is left out is said then."""


def shard_items(plan: Plan, number: int) -> list[int]:
    """The items of a shard, in the input's order."""
    start = number * plan.samples_per_shard
    places = np.arange(start, min(start + plan.samples_per_shard, plan.samples))
    if plan.shuffle_seed is None:
        return places.tolist()
    return np.sort(shuffled(places, plan.samples, plan.run, plan.shuffle_seed)).tolist()


def shard_samples(plan: Plan, source: Source, number: int, tally: Tally) -> Iterator[EncodedSample]:
    """The samples of a shard. They are read in the input's order and shuffled on their way out."""
    encoded = encode_all(plan, source, shard_items(plan, number), tally)
    if plan.shuffle_seed is None:
        yield from encoded
        return
    samples = list(encoded)
    for i in permute(np.arange(len(samples)), len(samples), key_of(plan.shuffle_seed, number)).tolist():
        yield samples[i]


def shuffled(places: Ints, count: int, run: int, seed: int) -> Ints:
    """The items at places of a shuffle of 0..count−1 that keeps runs of consecutive items together."""
    runs = -(-count // run)
    order = permute(np.arange(runs) if run > 1 else places, runs, key_of(seed))
    if run == 1:
        return order
    sizes = np.where(order == runs - 1, count - (runs - 1) * run, run)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    found = np.searchsorted(starts, places, side="right") - 1
    return order[found] * run + places - starts[found]


def encode_all(plan: Plan, source: Source, numbers: Iterable[int], tally: Tally) -> Iterator[EncodedSample]:
    """Items as they will stand in shards; DataError for one that can't be decoded, unless the plan leaves it out."""
    for number in numbers:
        name = f"image {number}"
        try:
            item = source[number]
            name = item.name or name
            orientation = upright.orientation(item.image) if isinstance(item.image, bytes) else upright.UPRIGHT
            sample = encode_item(plan, item, number, orientation)
        except decode.BadSampleError as error:
            what = f"{name}: {error}"
            if not plan.skip_bad:
                raise DataError(
                    f"{what}; put a whole image in its place, or let such images be left out with --skip-bad: the same "
                    f"command then goes on from here"
                ) from None
            if not tally.probing:
                log.warning("make_shards: left out: %s", what)
            continue
        if orientation != upright.UPRIGHT:
            tally.lying.append(name)
        yield sample


def encode_item(plan: Plan, item: Item, number: int, orientation: int) -> EncodedSample:
    """An item as it will stand in a shard; raises BadSampleError."""
    name = str(PurePosixPath(item.name).with_suffix("")) if is_image(item.name) else item.name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-60:]
    key = f"{number:08d}_{stem}" if stem else f"{number:08d}"
    data = item.image if isinstance(item.image, bytes) else decode.encode_raw(item.image)
    if plan.keeps and isinstance(item.image, bytes):
        decode.decode(data)  # or half an image would be kept
        return EncodedSample(key, data, EXTENSIONS[decode.describe(data)[0]], item.label)
    if orientation == upright.UPRIGHT:
        pixels = decode.decode(data, plan.options.size, plan.channels)
    else:
        pixels = upright.turn(decode.decode(data, None, plan.channels), orientation)
        if plan.options.size is not None:
            pixels = decode.fit(pixels, plan.options.size)
    if plan.format == "jpeg":
        return EncodedSample(key, decode.encode_jpeg(pixels, plan.quality), "jpg", item.label)
    if plan.format == "raw":
        return EncodedSample(key, decode.encode_raw(pixels), "npy", item.label)
    return EncodedSample(key, decode.encode_png(pixels), "png", item.label)
