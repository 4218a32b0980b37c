"""From an input to a finished data set: in parallel, in a deterministic shuffle, and again after a kill.

Shard j is a pure function of the plan and of j, so it may be made anywhere, and twice. A shard's part
file is published after the shard; whoever starts the same plan again makes the shards that have none.
The index is the same bytes whatever happened on the way.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data import decode, parts
from ddpm_dist.data.index import INDEX_NAME, DataIndex, load_index
from ddpm_dist.data.permutation import Ints, key_of, permute
from ddpm_dist.data.plans import PLAN_NAME, PlanHead, parse_plan, shard_name
from ddpm_dist.data.processes import in_processes
from ddpm_dist.data.sources import Item, Source, SourceOptions, open_source
from ddpm_dist.data.sources.files import is_image
from ddpm_dist.data.writer import EncodedSample, WrittenShard, write_index, write_shard
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from ddpm_dist.progress import Progress, counted

log = logging.getLogger(__name__)

MIN_SHARDS = 8
PROBES = 64
MEMBER_BYTES = 2048
"""What a tar adds to an image: two headers, a label, padding."""
EXTENSIONS = {
    "png": "png", "jpeg": "jpg", "mpo": "jpg", "webp": "webp", "gif": "gif", "bmp": "bmp", "ppm": "ppm", "tiff": "tif",
    "npy": "npy",
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

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    @property
    def head(self) -> PlanHead:
        source = " ".join([self.kind, *self.options.inputs])
        return PlanHead(source, self.samples, self.samples_per_shard, self.skip_bad)

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def make_plan(
    kind: str,
    options: SourceOptions,
    *,
    format: str,
    quality: int,
    channels: int | None,
    shuffle_seed: int | None,
    skip_bad: bool,
    samples_per_shard: int | None,
    bytes_per_shard: int,
) -> Plan:
    """The plan for an input: opens it and looks at some of its items to size the shards."""
    source = open_source(kind, options)
    if not len(source):
        raise DataError(f"{kind} {' '.join(options.inputs)}: holds no image")
    plan = Plan(kind, options, len(source), 1, format, quality, channels, shuffle_seed, skip_bad, source.run)
    if samples_per_shard is None:
        probes = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist()
        sizes = [len(sample.image) + MEMBER_BYTES for sample in _encode_all(plan, source, probes)]
        samples_per_shard = max(1, min(int(bytes_per_shard // np.mean(sizes or 1)), -(-len(source) // MIN_SHARDS)))
    return replace(plan, samples_per_shard=samples_per_shard)


def encode_item(plan: Plan, item: Item, number: int) -> EncodedSample:
    """An item as it will stand in a shard; raises BadSampleError."""
    name = str(PurePosixPath(item.name).with_suffix("")) if is_image(item.name) else item.name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-60:]
    key = f"{number:08d}_{stem}" if stem else f"{number:08d}"
    size = plan.options.size
    if plan.format == "keep" and isinstance(item.image, bytes) and size is None and plan.channels is None:
        form = decode.describe(item.image)[0]
        return EncodedSample(key, item.image, EXTENSIONS[form], item.label)
    data = item.image if isinstance(item.image, bytes) else decode.encode_raw(item.image)
    pixels = decode.decode(data, size, plan.channels)
    if plan.format == "jpeg":
        return EncodedSample(key, decode.encode_jpeg(pixels, plan.quality), "jpg", item.label)
    if plan.format == "raw":
        return EncodedSample(key, decode.encode_raw(pixels), "npy", item.label)
    return EncodedSample(key, decode.encode_png(pixels), "png", item.label)


def make_shard(plan: Plan, source: Source, url: str, number: int) -> int:
    """Makes and publishes one shard and then its part file; returns its number of samples."""
    written = write_shard(url, shard_name(number), shard_samples(plan, source, number))
    parts.publish_part(url, number, written)
    return written.info.samples


def shard_samples(plan: Plan, source: Source, number: int) -> Iterator[EncodedSample]:
    """The samples of a shard. They are read in the input's order and shuffled on their way out."""
    start = number * plan.samples_per_shard
    places = np.arange(start, min(start + plan.samples_per_shard, plan.samples))
    if plan.shuffle_seed is None:
        yield from _encode_all(plan, source, places.tolist())
        return
    items = np.sort(shuffled(places, plan.samples, plan.run, plan.shuffle_seed)).tolist()
    encoded = list(_encode_all(plan, source, items))
    for i in permute(np.arange(len(encoded)), len(encoded), key_of(plan.shuffle_seed, number)).tolist():
        yield encoded[i]


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


def _encode_all(plan: Plan, source: Source, numbers: Iterable[int]) -> Iterator[EncodedSample]:
    for number in numbers:
        item = source[number]
        try:
            yield encode_item(plan, item, number)
        except decode.BadSampleError as error:
            what = f"{item.name or f'image {number}'}: {error}"
            if not plan.skip_bad:
                raise DataError(
                    f"{what}; put a whole image in its place, or let such images be left out with --skip-bad: the same "
                    f"command then goes on from here"
                ) from None
            log.warning("make_shards: left out: %s", what)


def build(plan: Plan, url: str, run: Callable[[Plan, str, list[int]], Iterable[int]]) -> DataIndex:
    """Makes the data set at a URL, or what is missing of it.

    run: makes the shards of the given numbers and yields the sample count of each when it is done.
    Refuses, with a ConfigError, to write where something else is.
    """
    if _claim(plan, url):
        log.info("make_shards: %s holds this data set already, complete", storage.redact(url))
        return load_index(url)
    finished = _finished(plan, url)
    missing = [number for number in range(plan.shards) if number not in finished]
    done = sum(plan.head.samples_of(number) for number in finished)
    log.info(
        "make_shards: %s in %s to %s%s",
        counted(plan.samples, "sample"),
        counted(plan.shards, "shard"),
        storage.redact(url),
        f"; {len(finished)} of them there already" if finished else "",
    )
    started = time.monotonic()
    with Progress("make_shards", "sample", plan.samples, done) as progress:
        for count in run(plan, url, missing):
            progress.add(count)
    index = _publish_index(plan, url)
    left_out = plan.samples - index.num_samples
    log.info(
        "make_shards: %s, %d bytes, %s%s; %.1f s",
        counted(index.num_samples, "sample"),
        index.num_bytes,
        f"{index.num_classes} classes" if index.num_classes else "no labels",
        f", {left_out} left out (--skip-bad)" if left_out else "",
        time.monotonic() - started,
    )
    return index


class ShardMaker:
    """Makes shards of a plan, by number; the input is opened once."""

    def __init__(self, plan: Plan, url: str) -> None:
        self._plan, self._url = plan, url
        self._source = open_source(plan.kind, plan.options)

    def __call__(self, number: int) -> int:
        return make_shard(self._plan, self._source, self._url, number)


def run_in_processes(workers: int, plan: Plan, url: str, numbers: list[int]) -> Iterator[int]:
    """Shards over the cores of this machine."""
    return in_processes(partial(ShardMaker, plan, url), numbers, workers)


def _claim(plan: Plan, url: str) -> bool:
    """Whether the data set is complete; ConfigError if the URL holds something else than a part of it."""
    storage.check_access(url)
    try:
        there = storage.read(storage.join(url, PLAN_NAME))
    except NotFoundError:
        if storage.list_names(url):
            raise ConfigError(f"{storage.redact(url)}: not empty; nothing is overwritten, choose another URL") from None
        if storage.create(storage.join(url, PLAN_NAME), plan.to_bytes()):
            return False
        there = storage.read(storage.join(url, PLAN_NAME))
    if parse_plan(there) is None:
        raise ConfigError(f"{storage.redact(url)}: not empty; nothing is overwritten, choose another URL")
    complete = storage.exists(storage.join(url, INDEX_NAME))
    if there != plan.to_bytes():
        old, new = json.loads(there), json.loads(plan.to_bytes())
        differs = {key: f"{key}: {old.get(key)} there, {new[key]} now" for key in new if old.get(key) != new[key]}
        if set(differs) != {"skip_bad"} or not plan.skip_bad:
            raise ConfigError(
                f"{storage.redact(url)}: holds another data set ({', '.join(differs.values())}); nothing is "
                f"overwritten, choose another URL, or delete the folder if it was not to be finished"
            )
        if not complete:  # its finished shards met no bad image, so they are what --skip-bad would make
            storage.publish(storage.join(url, PLAN_NAME), plan.to_bytes())
    if complete:
        _check_whole(plan, url)
    return complete


def _check_whole(plan: Plan, url: str) -> None:
    """ConfigError for an index that isn't that of the whole plan: another tool made it of what there was."""
    index = load_index(url)
    lacks = plan.head.misses({shard.name: shard.samples for shard in index.shards})
    if lacks:
        raise ConfigError(
            f"{storage.redact(url)}: {INDEX_NAME} lists {counted(index.num_samples, 'sample')}, but {PLAN_NAME} has "
            f"{plan.samples}: {lacks}. It was made while this set wasn't finished; move {INDEX_NAME} away, and this "
            f"command goes on from here"
        )


def _finished(plan: Plan, url: str) -> set[int]:
    """Numbers of the shards that an earlier start finished, and that are there as they were then."""
    found = parts.read_finished(url)
    there = storage.list_objects(url) if found else {}
    return {number for number, part in found.items() if _is_of(plan, number, part) and _lies(part, there)}


def _is_of(plan: Plan, number: int, part: WrittenShard) -> bool:
    return number < plan.shards and part.info.name == shard_name(number) and part.info.samples <= plan.samples_per_shard


def _lies(part: WrittenShard, there: Mapping[str, int]) -> bool:
    return there.get(part.info.name) == part.info.bytes


def _publish_index(plan: Plan, url: str) -> DataIndex:
    source = open_source(plan.kind, plan.options)
    found = parts.read_finished(url)
    if not set(range(plan.shards)) <= found.keys() and storage.exists(storage.join(url, INDEX_NAME)):
        log.info("make_shards: %s was finished by another make_shards meanwhile", storage.redact(url))
        _check_whole(plan, url)
        index = load_index(url)
    else:
        written = [part for number, part in sorted(found.items()) if _is_of(plan, number, part)]
        lacks = plan.head.misses({part.info.name: part.info.samples for part in written})
        if lacks:
            raise DataError(f"{storage.redact(url)}: {lacks}, although all were made; was something deleted there?")
        index = write_index(url, written, class_names=source.class_names, about=source.about)
    parts.delete_parts(url)
    return index
