"""From an input to a finished data set: in parallel, in a deterministic shuffle, and again after a kill.

Shard j is a pure function of the plan and of j, so it may be made anywhere, and twice. A shard's part
file is published after the shard; whoever starts the same plan again makes the shards that have none.
The index is the same bytes whatever happened on the way.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data import identity, parts
from ddpm_dist.data.index import INDEX_NAME, DataIndex, load_index
from ddpm_dist.data.planned import Plan as Plan, Tally, encode_all, shard_items, shard_samples
from ddpm_dist.data.plans import PLAN_NAME, parse_plan, shard_name
from ddpm_dist.data.processes import in_processes
from ddpm_dist.data.sources import Source, SourceOptions, open_source
from ddpm_dist.data.writer import WrittenShard, write_index, write_shard
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from ddpm_dist.progress import Progress, counted

log = logging.getLogger(__name__)

MIN_SHARDS = 8
PROBES = 64
MEMBER_BYTES = 2048
"""What a tar adds to an image: two headers, a label, padding."""


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
    options = options.normal(kind)
    source = open_source(kind, options)
    if not len(source):
        raise DataError(f"{kind} {' '.join(options.inputs)}: holds no image")
    plan = Plan(kind, options, len(source), 1, format, quality, channels, shuffle_seed, skip_bad, source.run)
    if samples_per_shard is None:
        probes = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist()
        sizes = [len(sample.image) + MEMBER_BYTES for sample in encode_all(plan, source, probes, Tally(probing=True))]
        samples_per_shard = max(1, min(int(bytes_per_shard // np.mean(sizes or 1)), -(-len(source) // MIN_SHARDS)))
    for note in source.notes:
        log.info("make_shards: %s", note)
    plan = replace(plan, samples_per_shard=samples_per_shard)
    return replace(plan, marks=tuple(identity.mark(source, shard_items(plan, n)) for n in range(plan.shards)))


@dataclass(frozen=True)
class Made:
    """A shard that is done."""

    samples: int
    lying: list[str]
    """Names of its photos whose EXIF orientation isn't upright."""


def make_shard(plan: Plan, source: Source, url: str, number: int) -> Made:
    """Makes and publishes one shard and then its part file; DataError where the input isn't the one of the plan."""
    if identity.mark(source, shard_items(plan, number)) != plan.marks[number]:
        raise DataError(
            f"{plan.head.source}: its files or labels for {shard_name(number)} aren't those that were planned: it "
            f"changed meanwhile, or is another on this machine"
        )
    tally = Tally()
    written = write_shard(url, shard_name(number), shard_samples(plan, source, number, tally))
    parts.publish_part(url, number, written)
    return Made(written.info.samples, tally.lying)


def build(plan: Plan, url: str, run: Callable[[Plan, str, list[int]], Iterable[Made]]) -> DataIndex:
    """Makes the data set at a URL, or what is missing of it.

    run: makes the shards of the given numbers and yields each when it is done.
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
    lying: list[str] = []
    with Progress("make_shards", "sample", plan.samples, done) as progress:
        for made in run(plan, url, missing):
            progress.add(made.samples)
            lying += made.lying
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
    if lying:
        what = "kept as they lie, and trained on so" if plan.keeps else "turned upright"
        log.info("make_shards: %s by their EXIF orientation (%s, …): %s", counted(len(lying), "photo"), lying[0], what)
    return index


class ShardMaker:
    """Makes shards of a plan, by number; the input is opened once."""

    def __init__(self, plan: Plan, url: str) -> None:
        self._plan, self._url = plan, url
        self._source = open_source(plan.kind, plan.options)

    def __call__(self, number: int) -> Made:
        return make_shard(self._plan, self._source, self._url, number)


def run_in_processes(workers: int, plan: Plan, url: str, numbers: list[int]) -> Iterator[Made]:
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
        finished = range(plan.shards) if complete else _finished(plan, url)
        differs = identity.differences(json.loads(there), json.loads(plan.to_bytes()), finished)
        if set(differs) - ({"skip_bad"} if plan.skip_bad else set()):
            raise ConfigError(
                f"{storage.redact(url)}: holds another data set ({', '.join(differs.values())}); nothing is "
                f"overwritten, choose another URL, or delete the folder if it was not to be finished"
            )
        if not complete:  # the finished shards are what would be made now; those of --skip-bad met no bad image
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
