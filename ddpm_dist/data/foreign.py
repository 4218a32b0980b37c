"""An index for WebDatasets that others wrote. It adds objects to their folder; theirs it never changes or deletes."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from ddpm_dist import storage
from ddpm_dist.data import parts, tar
from ddpm_dist.data.index import (
    INDEX_FORMAT,
    INDEX_NAME,
    LEFT_OUT,
    TABLE_FOLDER,
    TABLE_MAGIC,
    DataIndex,
    index_bytes,
    table_name,
)
from ddpm_dist.data.plans import PlanHead, refuse_unfinished
from ddpm_dist.data.processes import default_workers, in_processes
from ddpm_dist.data.writer import WrittenShard, index_tar, make_index
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from ddpm_dist.progress import Progress, counted

log = logging.getLogger(__name__)

DEFAULT_LABEL = "cls"
SHOWN = 20


def index_shards(
    url: str, *, label_field: str = DEFAULT_LABEL, workers: int | None = None, leave_out_damaged: bool = False
) -> DataIndex:
    """Writes the index of all tars below a URL; started again, it goes on with those that have no table yet.

    label_field: extension of the member with the class number, or `json:FIELD` for a field of the .json member.
    Damaged shards are a DataError that lists them, or are left out.
    """
    storage.check_access(url)
    tars = _tars(url)
    plan = refuse_unfinished(url, set(tars))
    _refuse_overwriting(url, tars)
    names = list(tars)
    finished = _finished(url, tars, label_field)
    missing = [number for number in range(len(names)) if number not in finished]
    if finished:
        log.info("index_shards: %d of %s were indexed before", len(finished), counted(len(names), "shard"))
    damaged: dict[str, str] = {}
    make = partial(_Indexer, url, tars, label_field)
    with Progress("index_shards", "shard", len(names), len(finished)) as progress:
        for number, done in in_processes(make, missing, workers or default_workers(sum(tars.values()))):
            progress.add()
            if isinstance(done, str):
                log.warning("index_shards: %s", done)
                damaged[names[number]] = done
            else:
                finished[number] = done
    if damaged and (not leave_out_damaged or len(damaged) == len(names)):
        listed = "\n  ".join(list(damaged.values())[:SHOWN])
        raise DataError(
            f"{len(damaged)} of {counted(len(names), 'shard')} can't be indexed:\n  {listed}\nrestore them and start "
            f"this again, or leave them out with --leave-out-damaged (but not all)"
        )
    written = [finished[number] for number in sorted(finished)]
    if label_field != DEFAULT_LABEL and not any(part.summary.classes for part in written):
        extension = label_field.partition(":")[0]
        raise DataError(f"--label {label_field}: no sample has a member .{extension}; `tar tf` shows what there is")
    index = make_index(url, written, about={LEFT_OUT: damaged} if damaged else None)
    _check_plan(plan, index)
    if not storage.create(storage.join(url, INDEX_NAME), index_bytes(index)):
        _refuse_overwriting(url, tars)
    parts.delete_parts(url)
    _tell_left_out(written)
    return index


def _tars(url: str) -> dict[str, int]:
    """{name: bytes} of the shards below a URL."""
    found = {name: size for name, size in storage.list_objects(url).items() if name.endswith(".tar")}
    tars = {name: size for name, size in found.items() if not tar.is_clutter(name)}
    if len(tars) < len(found):
        hidden = sorted(found.keys() - tars.keys())
        log.info("index_shards: left out: %s, such as %s", counted(len(hidden), "hidden file"), hidden[0])
    if not tars:
        raise NotFoundError(f"{storage.redact(url)}: no .tar is there")
    return tars


def _refuse_overwriting(url: str, tars: Mapping[str, int]) -> None:
    """ConfigError where an index is, or something of somebody else's under one of the names that would be written."""
    place = storage.join(url, INDEX_NAME)
    try:
        there = storage.read(place)
    except NotFoundError:
        there = None
    if there is not None and INDEX_FORMAT.encode() in there[:200]:
        raise ConfigError(
            f"{storage.redact(url)}: has an index already; ddpm-shards verify checks it. To make another one, "
            f"delete {INDEX_NAME}"
        )
    if there is not None:
        raise ConfigError(
            f"{storage.redact(place)}: is no index of this project's ({there[:40]!r}), and nothing is overwritten"
        )
    tables = storage.list_objects(storage.join(url, TABLE_FOLDER))
    for name in tars:
        short, table = table_name(name).removeprefix(f"{TABLE_FOLDER}/"), storage.join(url, table_name(name))
        if tables.get(short) and storage.read_range(table, 0, min(len(TABLE_MAGIC), tables[short])) != TABLE_MAGIC:
            raise ConfigError(f"{storage.redact(table)}: is no table of this project's, and nothing is overwritten")


def _finished(url: str, tars: Mapping[str, int], label_field: str) -> dict[int, WrittenShard]:
    """The shards that an earlier start indexed: with the same labels, and as they are now."""
    if not parts.same_as_before(url, label_field.encode()):
        parts.delete_parts(url)
        parts.same_as_before(url, label_field.encode())
    now = dict(enumerate(tars.items()))
    found = parts.read_finished(url)
    return {number: part for number, part in found.items() if now.get(number) == (part.info.name, part.info.bytes)}


def _check_plan(plan: PlanHead | None, index: DataIndex) -> None:
    """DataError where make_shards planned other shards than those that are there."""
    lacks = plan.misses({shard.name: shard.samples for shard in index.shards}) if plan else None
    if plan and lacks:
        raise DataError(
            f"{storage.redact(index.url)}: make_shards ({plan.source}) planned {plan.samples} samples here, but {lacks}"
        )


def _tell_left_out(written: Sequence[WrittenShard]) -> None:
    """Says which files of the tars belong to no sample."""
    counts: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for part in written:
        for what, (count, paths) in part.summary.left_out.items():
            counts[what] += count
            shown.setdefault(what, f"{part.info.name}: {', '.join(paths)}")
    for what in sorted(counts):
        log.warning("index_shards: left out: %s, such as %s", counted(counts[what], what), shown[what])


class _Indexer:
    def __init__(self, url: str, tars: Mapping[str, int], label_field: str) -> None:
        self._url, self._tars, self._label_field = url, list(tars.items()), label_field

    def __call__(self, number: int) -> tuple[int, WrittenShard | str]:
        """The number, and what is known of the shard or why it can't be indexed."""
        name, size = self._tars[number]
        try:
            data = storage.read(storage.join(self._url, name))
            if len(data) != size:
                return number, f"{name}: changed while it was read: it had {size} bytes, now {len(data)}"
            written, table = index_tar(name, data, self._label_field)
        except NotFoundError:
            return number, f"{name}: vanished after it was listed"
        except DataError as error:
            return number, str(error)
        storage.publish(storage.join(self._url, table_name(name)), table.to_bytes())
        parts.publish_part(self._url, number, written)
        return number, written
