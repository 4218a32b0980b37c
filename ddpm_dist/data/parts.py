"""What is known of finished shards while a data set is being made: one small object each, gone with the index."""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from ddpm_dist import storage
from ddpm_dist.data.index import ShardInfo
from ddpm_dist.data.writer import ShardSummary, WrittenShard

PARTS_FOLDER = "parts"
THREADS = 16


def publish_part(url: str, number: int, written: WrittenShard) -> None:
    """Says that shard `number` is finished; published after the shard and its table."""
    storage.publish(_part_url(url, number), json.dumps(asdict(written)).encode())


def finished_parts(url: str) -> set[int]:
    """Numbers of the finished shards."""
    names = storage.list_names(storage.join(url, PARTS_FOLDER))
    return {int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name)}


def read_parts(url: str, numbers: Iterable[int]) -> list[WrittenShard]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda number: _parse(storage.read(_part_url(url, number))), numbers))


def delete_parts(url: str) -> None:
    storage.delete_tree(storage.join(url, PARTS_FOLDER))


def _part_url(url: str, number: int) -> str:
    return storage.join(url, PARTS_FOLDER, f"{number:06d}.json")


def _parse(data: bytes) -> WrittenShard:
    values = json.loads(data)
    summary = values["summary"]
    sizes = {name: tuple(summary[name]) for name in ("min_size", "max_size")}
    return WrittenShard(ShardInfo(**values["info"]), ShardSummary(**{**summary, **sizes}))
