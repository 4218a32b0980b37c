"""What is known of finished shards while a data set is being made or indexed: one small object each, gone at the end.

They lie in a folder whose name nobody else has, and are deleted by their names, one by one: data of the user's can lie
anywhere. Version 0.1.0 had them in `parts`; there, what parses as ours is ours.
"""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from ddpm_dist import storage
from ddpm_dist.data.index import ShardInfo
from ddpm_dist.data.writer import ShardSummary, WrittenShard
from ddpm_dist.errors import AccessError, DataError, NotFoundError

log = logging.getLogger(__name__)

PARTS_FOLDER = "ddpm_dist-unfinished"
OLD_PARTS_FOLDER = "parts"
ASKED_NAME = "asked"
"""Object beside the parts with what was asked for, so that another question doesn't take these for its answers."""
THREADS = 16


def publish_part(url: str, number: int, written: WrittenShard) -> None:
    """Says that shard `number` is finished; published after the shard and its table."""
    storage.publish(_part_url(url, number, PARTS_FOLDER), json.dumps(asdict(written)).encode())


def read_finished(url: str, *, of_old: bool = True) -> dict[int, WrittenShard]:
    """The finished shards by number; of_old: those of 0.1.0 as well."""
    found: dict[int, WrittenShard] = {}
    for folder in (OLD_PARTS_FOLDER, PARTS_FOLDER) if of_old else (PARTS_FOLDER,):
        numbers = _numbers(url, folder)
        with ThreadPoolExecutor(THREADS) as pool:
            parts = pool.map(_read, [_part_url(url, number, folder) for number in numbers])
            found |= {number: part for number, part in zip(numbers, parts, strict=True) if part is not None}
    return found


def same_as_before(url: str, asked: bytes) -> bool:
    """Whether the parts that are there answer this question; where none was asked, it is now."""
    place = storage.join(url, PARTS_FOLDER, ASKED_NAME)
    return storage.create(place, asked) or storage.read(place) == asked


def delete_parts(url: str) -> None:
    """Removes the parts, of 0.1.0 too, and their folders where nothing else is in them; they stay where a store lets
    nobody delete, and harm nothing there."""
    try:
        _delete_parts(url)
    except AccessError as error:
        log.warning("%s: what was needed to make it stays: %s", storage.redact(url), error)


def _delete_parts(url: str) -> None:
    for folder in (OLD_PARTS_FOLDER, PARTS_FOLDER):
        place = storage.join(url, folder)
        names = [_part_url(url, number, folder) for number in _numbers(url, folder)]
        if folder == OLD_PARTS_FOLDER:
            names = [name for name in names if _read(name) is not None]
        else:
            names.append(storage.join(place, ASKED_NAME))
        if names:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(storage.delete, names))
            if not storage.list_names(place):
                storage.delete_tree(place)  # an empty folder, or what a killed writer left half-written there


def _numbers(url: str, folder: str) -> list[int]:
    names = storage.list_names(storage.join(url, folder))
    return [int(name.removesuffix(".json")) for name in names if re.fullmatch(r"[0-9]{6,12}\.json", name)]


def _part_url(url: str, number: int, folder: str) -> str:
    return storage.join(url, folder, f"{number:06d}.json")


def _read(place: str) -> WrittenShard | None:
    """None where there is none, or an object of somebody else's."""
    try:
        return _parse(storage.read(place))
    except (NotFoundError, DataError):
        return None


def _parse(data: bytes) -> WrittenShard:
    try:
        values = json.loads(data)
        summary = values["summary"]
        sizes = {name: tuple(summary[name]) for name in ("min_size", "max_size")}
        return WrittenShard(ShardInfo(**values["info"]), ShardSummary(**{**summary, **sizes}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError("not what is known of a shard") from None
