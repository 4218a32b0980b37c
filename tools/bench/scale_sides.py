"""What one rank of a simulated run does, part by part, and what it costs: for tools/bench/scale.py.

Each part runs in a fresh process, which is measured from after its imports: processor seconds, and the most memory
beyond what it had. The store is a folder; its requests are counted at the doors of `storage` and of the range reader.
"""

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_dist import storage
from ddpm_dist.data.index import DataIndex, Schema, ShardInfo, load_index, save_index
from ddpm_dist.data.order import Order, share_of
from ddpm_dist.data.ranges import RangeReader
from ddpm_dist.engine import Address, bytes_of
from ddpm_dist.models import UNet
from ddpm_dist.recipe import load_config
from ddpm_dist.snapshot import network_of
from ddpm_dist.state import format as fmt, reader
from ddpm_dist.state.reader import Target
from ddpm_dist.state.source import Source

KINDS = ["weights", "exp_avg", "exp_avg_sq", "ema"]
SHARD_BYTES = 2_100_000
COUNTED = ("read", "read_range", "size", "exists", "list_names", "list_objects", "publish", "create")


@dataclass(frozen=True)
class Size:
    """A run that is simulated."""

    shards: int = 10**6
    samples: int = 1000
    """Of each shard."""
    ranks: int = 16_384
    batch: int = 65_536
    streams: int = 32


@dataclass(frozen=True)
class Cost:
    """What a part took in its process, beyond its imports."""

    value: Any
    """What the part returned: its own figures."""
    cpu_s: float
    memory_mib: float


def measured(part: Callable[..., Any], *arguments: Any) -> Cost:
    """The part in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, part, arguments))
    process.start()
    theirs.close()
    try:
        found = mine.recv()
    finally:
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _measure(results: Any, part: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    before = _memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.process_time()
    try:
        value = part(*arguments)
        cpu = time.process_time() - start
        peak = _memory_kib("VmHWM") - _memory_kib("RssShmem")
        results.send(Cost(value, cpu, max(0, peak - before) / 1024))
    except Exception as error:
        results.send(f"{type(error).__name__}: {error}")


def _memory_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


@contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """Requests to the store meanwhile, by the name of the object."""
    seen: Counter[str] = Counter()

    def counting(function: Callable[..., Any], url_at: int) -> Callable[..., Any]:
        def counts(*arguments: Any, **options: Any) -> Any:
            seen[str(arguments[url_at]).rpartition("/")[2]] += 1
            return function(*arguments, **options)

        return counts

    kept = {name: getattr(storage, name) for name in COUNTED}
    whole = RangeReader.read_whole
    for name, function in kept.items():
        setattr(storage, name, counting(function, 0))
    RangeReader.read_whole = counting(whole, 1)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for name, function in kept.items():
            setattr(storage, name, function)
        RangeReader.read_whole = whole  # type: ignore[method-assign]


def make_index(url: str, size: Size) -> int:
    """Writes the index of an imaginary set; bytes of its largest object."""
    hashes = np.random.default_rng(0).bytes(32 * size.shards).hex()
    rows = tuple(
        ShardInfo(
            f"shard-{i:06d}.tar", SHARD_BYTES + i % 977, size.samples, hashes[64 * i : 64 * i + 32],
            38_000 + i % 101, hashes[64 * i + 32 : 64 * i + 64],
        )
        for i in range(size.shards)
    )  # fmt: skip
    save_index(DataIndex(url, rows, Schema({"png": size.shards * size.samples}, (32, 32), (32, 32))))
    return max(storage.list_objects(url).values())


def start(url: str, size: Size, rank: int) -> dict[str, float]:
    """The data plane of a rank's start: index, order, the blocks of its first batch."""
    with counted_requests() as requests:
        index = load_index(url)
        order = order_of(index.counts, size)
        places = share_of(rank, size.ranks, size.batch)
        order.at(0, *places)
        blocks = order.blocks(*places, 0)
        read = sum(block.count for block in (next(blocks) for _ in order.runs(*places)))
    return {"requests": requests.total(), "block samples": read}


def steps(size: Size, rank: int, number: int = 200) -> dict[str, float]:
    """Seconds that the order of one step costs a rank, and samples read for each that it uses."""
    order = order_of(np.full(size.shards, size.samples, np.int64), size)
    places = share_of(rank, size.ranks, size.batch)
    order.at(0, *places)
    began = time.process_time()
    for step in range(number):
        order.at(step, *places)
    seconds = (time.process_time() - began) / number
    width = sum(order.sets[d].width(stream) for d, stream, _, _ in order.runs(*places))
    return {"seconds": seconds, "amplification": width / (places[1] - places[0])}


def order_of(counts: Any, size: Size) -> Order:
    return Order([counts], seed=1, global_batch=size.batch, streams=size.streams, shuffle_block=4096)


def shapes_of(recipe: str = "cifar10") -> dict[str, torch.Size]:
    """Of a recipe's network, without memory."""
    cfg = load_config(recipe, ["run.url=file:///none", "data.url=file:///data"])
    with torch.device("meta"):
        return {name: p.shape for name, p in UNet(network_of(cfg)).named_parameters()}


def pieces_of(stage: int, shapes: dict[str, torch.Size], rank: int, ranks: int) -> list[Address]:
    """What a rank owns under ZeRO, as DeepSpeed cuts it."""
    numels = {name: shape.numel() for name, shape in shapes.items()}
    found, start = [], 0
    part = -(-sum(numels.values()) // (2 * ranks)) * 2
    for name, numel in numels.items():
        if stage == 3:
            each = -(-numel // ranks)
            low, high = min(numel, rank * each), min(numel, (rank + 1) * each)
        else:
            low, high = max(0, rank * part - start), min(numel, (rank + 1) * part - start)
            start += numel
        if low < high:
            found.append((name, low, high - low))
    return found


def part_of(stage: int, shapes: dict[str, torch.Size], rank: int, ranks: int) -> fmt.Part:
    """What a rank wrote of a state, without its bytes."""
    pieces = pieces_of(stage, shapes, rank, ranks)
    nbytes = fmt.ELEMENT_BYTES * len(KINDS) * sum(numel for _, _, numel in pieces)
    file = fmt.File(f"{rank:05d}-000.f32", nbytes, "0" * 64, [0xFFFFFFFF] * -(-nbytes // fmt.BLOCK_BYTES))
    return fmt.Part(pieces, KINDS, [file] if nbytes else [])


def save(url: str, stage: int, ranks: int) -> dict[str, float]:
    """Rank 0's manifest of the parts that all ranks wrote, as its writer's thread makes it."""
    shapes = shapes_of()
    texts = [fmt.encode_part(part_of(stage, shapes, rank, ranks)) for rank in range(ranks)]
    began = time.process_time()
    parts = [fmt.decode_part(text, "part") for text in texts]
    named = {name: list(shape) for name, shape in shapes.items()}
    manifest = fmt.Manifest(fmt.StateId(1, 1), named, parts, {}, {}, fmt.FILE_BYTES, fmt.BLOCK_BYTES)
    fmt.check_complete(manifest, "state")
    data = fmt.encode_manifest(manifest)
    seconds = time.process_time() - began
    storage.publish(storage.join(url, fmt.MANIFEST), data)
    return {"seconds": seconds, "bytes": len(data), "part bytes": max(map(len, texts))}


def resume(url: str, stage: int, ranks: int) -> dict[str, float]:
    """One rank of another number of ranks reads the manifest, and plans what it fetches."""
    shapes = shapes_of()
    owned = pieces_of(stage, shapes, ranks // 3, ranks)
    began = time.process_time()
    manifest = reader.read_manifest(url)
    decoded = time.process_time()
    targets = [Target(kind, *address[:2], torch.empty(address[2])) for address in owned for kind in KINDS]
    copies = reader._plan(Source(manifest), targets, [bytes_of(target.tensor) for target in targets])
    planned = time.process_time()
    return {
        "decode seconds": decoded - began,
        "plan seconds": planned - decoded,
        "files": len(copies),
    }


def ownership(stage: int, ranks: int) -> dict[str, float]:
    """What every rank holds of the others' pieces, to gather an average."""
    shapes = shapes_of()
    ranks_pieces = [pieces_of(stage, shapes, rank, ranks) for rank in range(ranks)]
    return {"pieces": sum(map(len, ranks_pieces)), "bytes": len(json.dumps(ranks_pieces))}


def folder_of(place: str) -> str:
    return f"file://{os.path.abspath(place)}"
