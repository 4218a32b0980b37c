"""From an input to a finished data set: in parallel, in a deterministic shuffle, and again after a kill.

Shard j is a pure function of the plan and of j, so it may be made anywhere, and twice. A shard's part
file is published after the shard; whoever starts the same plan again makes the shards that have none.
The index is the same bytes whatever happened on the way.
"""

import json
import logging
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data import decode
from ddpm_dist.data.index import INDEX_NAME, DataIndex, ShardInfo, load_index
from ddpm_dist.data.order import key_of, permute
from ddpm_dist.data.sources import Item, Source, SourceOptions, open_source
from ddpm_dist.data.writer import EncodedSample, ShardSummary, WrittenShard, write_index, write_shard
from ddpm_dist.errors import ConfigError, DataError, NotFoundError

log = logging.getLogger(__name__)

PLAN_NAME = "plan.json"
PARTS_FOLDER = "parts"
MIN_SHARDS = 8
PROBES = 64
PROGRESS_S = 5.0
CHECK_PARENT_S = 2.0
EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp", "gif": "gif", "bmp": "bmp", "ppm": "ppm", "tiff": "tif"}


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

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

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
    samples_per_shard: int | None,
    bytes_per_shard: int,
) -> Plan:
    """The plan for an input: opens it and looks at some of its items to size the shards."""
    source = open_source(kind, options)
    if not len(source):
        raise DataError(f"{kind} {' '.join(options.inputs)}: holds no image")
    plan = Plan(kind, options, len(source), 1, format, quality, channels, shuffle_seed)
    if samples_per_shard is None:
        probes = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int))
        mean = np.mean([len(encode_item(plan, source[int(i)], int(i)).image) for i in probes]) + 2048
        samples_per_shard = max(1, min(int(bytes_per_shard // mean), -(-len(source) // MIN_SHARDS)))
    return Plan(kind, options, len(source), samples_per_shard, format, quality, channels, shuffle_seed)


def encode_item(plan: Plan, item: Item, number: int) -> EncodedSample:
    """An item as it will stand in a shard; DataError names an image that can't be read."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name)[-60:]
    key = f"{number:08d}_{stem}" if stem else f"{number:08d}"
    size = plan.options.size
    if plan.format == "keep" and isinstance(item.image, bytes) and size is None and plan.channels is None:
        try:
            form = decode.describe(item.image)[0]
        except decode.BadSampleError as error:
            raise DataError(f"{item.name}: {error}; remove it from the input, or use --skip-bad") from None
        return EncodedSample(key, item.image, EXTENSIONS.get(form, form), item.label)
    try:
        data = item.image if isinstance(item.image, bytes) else decode.encode_raw(item.image)
        pixels = decode.decode(data, size, plan.channels)
    except decode.BadSampleError as error:
        raise DataError(f"{item.name or number}: {error}; remove it from the input") from None
    if plan.format == "jpeg":
        return EncodedSample(key, decode.encode_jpeg(pixels, plan.quality), "jpg", item.label)
    if plan.format == "raw":
        return EncodedSample(key, decode.encode_raw(pixels), "npy", item.label)
    return EncodedSample(key, decode.encode_png(pixels), "png", item.label)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def make_shard(plan: Plan, source: Source, url: str, number: int) -> int:
    """Makes and publishes one shard and then its part file; returns its number of samples."""
    written = write_shard(url, shard_name(number), shard_samples(plan, source, number))
    storage.publish(_part_url(url, number), json.dumps(asdict(written)).encode())
    return written.info.samples


def shard_samples(plan: Plan, source: Source, number: int) -> Iterator[EncodedSample]:
    start = number * plan.samples_per_shard
    places = np.arange(start, min(start + plan.samples_per_shard, plan.samples))
    if plan.shuffle_seed is not None:
        places = permute(places, plan.samples, key_of(plan.shuffle_seed))
    for i in places.tolist():
        yield encode_item(plan, source[i], i)


def build(plan: Plan, url: str, run: Callable[[Plan, str, list[int]], Iterable[int]]) -> DataIndex:
    """Makes the data set at a URL, or what is missing of it.

    run: makes the shards of the given numbers and yields the sample count of each when it is done.
    Refuses, with a ConfigError, to write where something else is.
    """
    if _claim(plan, url):
        log.info("make_shards: %s holds this data set already, complete", storage.redact(url))
        return load_index(url)
    finished = _finished(url)
    missing = [number for number in range(plan.shards) if number not in finished]
    done = sum(_count(plan, number) for number in finished)
    log.info(
        "make_shards: %d samples in %d shards to %s%s",
        plan.samples,
        plan.shards,
        storage.redact(url),
        f"; {len(finished)} shards are there" if finished else "",
    )
    started, shown = time.monotonic(), time.monotonic()
    made = 0
    for count in run(plan, url, missing):
        made += count
        now = time.monotonic()
        if now - shown > PROGRESS_S:
            rate, shown = made / (now - started), now
            left = (plan.samples - done - made) / rate
            log.info("make_shards: %d of %d samples, %.0f/s, %.0f s left", done + made, plan.samples, rate, left)
    index = _publish_index(plan, url)
    log.info(
        "make_shards: %d samples, %d bytes, %d classes; %.1f s",
        index.num_samples,
        index.num_bytes,
        index.num_classes or 0,
        time.monotonic() - started,
    )
    return index


def run_in_process(plan: Plan, url: str, numbers: list[int]) -> Iterator[int]:
    source = open_source(plan.kind, plan.options)
    for number in numbers:
        yield make_shard(plan, source, url, number)


def run_in_processes(workers: int) -> Callable[[Plan, str, list[int]], Iterator[int]]:
    """Shards over the cores of this machine."""

    def run(plan: Plan, url: str, numbers: list[int]) -> Iterator[int]:
        if workers == 1 or len(numbers) < 2:
            yield from run_in_process(plan, url, numbers)
            return
        context = multiprocessing.get_context("spawn")
        arguments = (plan, url, os.getpid())
        with ProcessPoolExecutor(min(workers, len(numbers)), context, _open_in_worker, arguments) as pool:
            try:
                yield from pool.map(_make_in_worker, numbers)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return run


_worker: tuple[Plan, str, Source]


def _open_in_worker(plan: Plan, url: str, parent: int) -> None:
    global _worker
    _worker = (plan, url, open_source(plan.kind, plan.options))
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """A killed parent can't stop its pool."""
    while os.getppid() == parent:
        time.sleep(CHECK_PARENT_S)
    os._exit(1)


def _make_in_worker(number: int) -> int:
    plan, url, source = _worker
    return make_shard(plan, source, url, number)


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
    if there != plan.to_bytes():
        old, new = json.loads(there), json.loads(plan.to_bytes())
        differs = ", ".join(f"{key}: {old.get(key)} there, {new[key]} now" for key in new if old.get(key) != new[key])
        raise ConfigError(
            f"{storage.redact(url)}: holds another data set ({differs}); nothing is overwritten, choose another URL"
        )
    return storage.exists(storage.join(url, INDEX_NAME))


def _part_url(url: str, number: int) -> str:
    return storage.join(url, PARTS_FOLDER, f"{number:06d}.json")


def _finished(url: str) -> set[int]:
    names = storage.list_names(storage.join(url, PARTS_FOLDER))
    return {int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name)}


def _count(plan: Plan, number: int) -> int:
    return min(plan.samples_per_shard, plan.samples - number * plan.samples_per_shard)


def _publish_index(plan: Plan, url: str) -> DataIndex:
    with ThreadPoolExecutor(16) as pool:
        written = list(pool.map(lambda number: _read_part(url, number), range(plan.shards)))
    source = open_source(plan.kind, plan.options)
    index = write_index(url, written, class_names=source.class_names, about=source.about)
    storage.delete_tree(storage.join(url, PARTS_FOLDER))
    return index


def _read_part(url: str, number: int) -> WrittenShard:
    values = json.loads(storage.read(_part_url(url, number)))
    summary = values["summary"]
    sizes = {name: tuple(summary[name]) for name in ("min_size", "max_size")}
    return WrittenShard(ShardInfo(**values["info"]), ShardSummary(**{**summary, **sizes}))
