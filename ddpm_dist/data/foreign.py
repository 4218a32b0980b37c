"""An index for WebDatasets that others wrote. It adds objects to their folder; theirs it never changes or deletes."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ddpm_dist import storage
from ddpm_dist.data import parts, tar
from ddpm_dist.data.index import (
    INDEX_FORMAT,
    INDEX_NAME,
    KEYS,
    LEFT_OUT,
    TABLE_FOLDER,
    TABLE_MAGIC,
    DataIndex,
    content_hash,
    index_bytes,
    table_name,
)
from ddpm_dist.data.plans import PlanHead, refuse_unfinished
from ddpm_dist.data.processes import default_workers, in_processes
from ddpm_dist.data.reading import NO_LABELS, Reading
from ddpm_dist.data.settle import settle_classes
from ddpm_dist.data.sources.base import open_input, reading as explained
from ddpm_dist.data.sources.labels import read_labels
from ddpm_dist.data.sources.splits import choose_shards
from ddpm_dist.data.writer import IMAGELESS, OWN, PHOTO, UNREADABLE, WrittenShard, index_tar, make_index
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from ddpm_dist.progress import Progress, counted

log = logging.getLogger(__name__)

SHOWN = 20
SAID = {
    IMAGELESS: "no image",
    UNREADABLE: "no image",
    PHOTO: "not upright by their EXIF orientation, and trained on as they lie (ddpm-shards make turns them)",
}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def index_shards(
    url: str,
    reading: Reading = OWN,
    *,
    at: str | None = None,
    workers: int | None = None,
    leave_out_damaged: bool = False,
) -> DataIndex:
    """Writes the index of all tars below a URL; started again, it goes on with those that have no table yet.

    reading: how samples are read. at: URL of another folder for the index, where shards can't be added to.
    Damaged shards are a DataError that lists them, or are left out; what can be read in two ways is a ConfigError.
    """
    home = at or url
    storage.check_access(home)
    tars = _tars(url)
    plan = refuse_unfinished(url, set(tars))
    names = choose_shards(tars, reading.include, reading.exclude, storage.redact(url))
    others = {name: f"{name}: not chosen (--include, --exclude)" for name in sorted(tars.keys() - set(names))}
    tars = {name: tars[name] for name in names}
    _refuse_overwriting(home, tars)
    finished = _finished(home, tars, reading)
    missing = [number for number in range(len(names)) if number not in finished]
    if finished:
        log.info("index_shards: %d of %s were indexed before", len(finished), counted(len(names), "shard"))
    damaged: dict[str, str] = {}
    make = partial(_Indexer, url, home, tars, reading)
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
        remedy = "" if len(damaged) == len(names) else "; --leave-out-damaged indexes the others alone"
        raise DataError(
            f"{len(damaged)} of {counted(len(names), 'shard')} can't be indexed:\n  {listed}\nmend or restore what is "
            f"damaged, and start this again{remedy}"
        )
    written = [finished[number] for number in sorted(finished)]
    _tell(written)
    _refuse_empty(url, written)
    written, class_names = settle_classes(home, written, reading)
    about: dict[str, Any] = {LEFT_OUT: others | damaged} if others or damaged else {}
    if reading.keys != OWN.keys:
        about[KEYS] = reading.keys
    index = make_index(url, written, class_names=class_names, about=about, at=at)
    _check_labels(reading, index)
    _check_plan(plan, index)
    if not storage.create(storage.join(home, INDEX_NAME), index_bytes(index)):
        _refuse_overwriting(home, tars)
    parts.delete_parts(home)
    return index


def _tars(url: str) -> dict[str, int]:
    """{name: bytes} of the shards below a URL."""
    there = storage.list_objects(url)
    found = {name: size for name, size in there.items() if name.endswith(".tar")}
    tars = {name: size for name, size in found.items() if not tar.is_clutter(name)}
    packed = [name for name in there if name.endswith(COMPRESSED) and not tar.is_clutter(name)]
    for what, names in (("hidden file", sorted(found.keys() - tars.keys())), ("compressed shard", packed)):
        if names:
            log.warning("index_shards: left out: %s, such as %s", counted(len(names), what), names[0])
    if packed and not tars:
        raise NotFoundError(
            f"{storage.redact(url)}: no .tar is there, but {packed[0]}; shards are plain tars, which can be read from "
            f"their middle: gunzip them"
        )
    if not tars:
        held = f"; {next(iter(there))} is" if there else ""
        if set(url) & set("*?{["):
            held += "; URL is their folder, and --include GLOB chooses among them"
        raise NotFoundError(f"{storage.redact(url)}: no .tar is there{held}")
    return tars


def _refuse_overwriting(home: str, tars: Mapping[str, int]) -> None:
    """ConfigError where an index is, or something of somebody else's under one of the names that would be written."""
    place = storage.join(home, INDEX_NAME)
    try:
        there = storage.read(place)
    except NotFoundError:
        there = None
    if there is not None and INDEX_FORMAT.encode() in there[:200]:
        raise ConfigError(
            f"{storage.redact(home)}: has an index already; ddpm-shards verify checks it. To make another one, "
            f"delete {INDEX_NAME}"
        )
    if there is not None:
        raise ConfigError(
            f"{storage.redact(place)}: is no index of this project's ({there[:40]!r}), and nothing is overwritten; "
            f"--index URL puts the index in another folder"
        )
    tables = storage.list_objects(storage.join(home, TABLE_FOLDER))
    for name in tars:
        short, table = table_name(name).removeprefix(f"{TABLE_FOLDER}/"), storage.join(home, table_name(name))
        if tables.get(short) and storage.read_range(table, 0, min(len(TABLE_MAGIC), tables[short])) != TABLE_MAGIC:
            raise ConfigError(
                f"{storage.redact(table)}: is no table of this project's, and nothing is overwritten; --index URL "
                f"puts the index in another folder"
            )


def _finished(home: str, tars: Mapping[str, int], reading: Reading) -> dict[int, WrittenShard]:
    """The shards that an earlier start indexed: read in the same way, and as they are now."""
    labels = None
    if reading.labels:
        with open_input(reading.labels, "a CSV or JSON file of labels") as file:
            labels = content_hash(file.read())
    asked = json.dumps({**asdict(reading), "labels": labels}).encode()
    if not parts.same_as_before(home, asked):
        parts.delete_parts(home)
        parts.same_as_before(home, asked)
    now = dict(enumerate(tars.items()))
    found = parts.read_finished(home, of_old=False)  # 0.1.0's don't say what they answer
    return {number: part for number, part in found.items() if now.get(number) == (part.info.name, part.info.bytes)}


def _refuse_empty(url: str, written: Sequence[WrittenShard]) -> None:
    """DataError for shards without samples, or without a single image."""
    samples = sum(part.info.samples for part in written)
    if not samples:
        raise DataError(f"{storage.redact(url)}: {counted(len(written), 'shard')}, and no sample in them")
    if not any(part.summary.formats for part in written):
        notes = ((part.info.name, part.summary.notes.get(why)) for part in written for why in (IMAGELESS, UNREADABLE))
        held = next((f"; {name}: {found[1][0]}" for name, found in notes if found), "")
        members = f". Images are members .{', .'.join(tar.IMAGE_EXTENSIONS)}; --image EXTENSION names another"
        raise DataError(
            f"{storage.redact(url)}: none of {counted(samples, 'sample')} has an image that can be read{held}"
            f"{members if any(IMAGELESS in part.summary.notes for part in written) else ''}"
        )


def _check_labels(reading: Reading, index: DataIndex) -> None:
    if index.num_classes is None and reading.label not in (OWN.label, NO_LABELS):
        extension = reading.label_member[0]
        raise DataError(f"--label {reading.label}: no sample has a member .{extension}; `tar tf` shows what there is")


def _check_plan(plan: PlanHead | None, index: DataIndex) -> None:
    """DataError where make_shards planned other shards than those that are there."""
    lacks = plan.misses({shard.name: shard.samples for shard in index.shards}) if plan else None
    if plan and lacks:
        raise DataError(
            f"{storage.redact(index.url)}: make_shards ({plan.source}) planned {plan.samples} samples here, but {lacks}"
        )


def _tell(written: Sequence[WrittenShard]) -> None:
    """Says which files of the tars belong to no sample, and which samples are not what they seem."""
    counts: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for part in written:
        for what, (count, paths) in part.summary.notes.items():
            counts[what] += count
            shown.setdefault(what, f"{part.info.name}: {', '.join(paths)}")
    for what in sorted(counts):
        said = SAID.get(what, "left out")
        log.warning("index_shards: %s: %s, such as %s", said, counted(counts[what], what), shown[what])
    first: dict[str, str] = {}
    for part in written:
        same = first.setdefault(part.info.hash, part.info.name)
        if same != part.info.name and part.info.samples:
            log.warning("index_shards: %s is %s once more, byte for byte (--exclude GLOB)", part.info.name, same)


class _Indexer:
    def __init__(self, url: str, home: str, tars: Mapping[str, int], reading: Reading) -> None:
        self._url, self._home, self._tars, self._reading = url, home, list(tars.items()), reading
        self._labels = read_labels(reading.labels) if reading.labels else None

    def __call__(self, number: int) -> tuple[int, WrittenShard | str]:
        """The number, and what is known of the shard or why it can't be indexed."""
        name, size = self._tars[number]
        try:
            data = storage.read(storage.join(self._url, name))
            if len(data) != size:
                return number, f"{name}: changed while it was read: it had {size} bytes, now {len(data)}"
            with explained(name, "a shard that can be indexed"):
                written, table = index_tar(name, data, self._reading, self._labels)
        except NotFoundError:
            return number, f"{name}: vanished after it was listed"
        except DataError as error:
            return number, str(error)
        if written.summary.classes:
            summary = replace(written.summary, labels=table.rows["label"].tolist())
            written = replace(written, summary=summary)
        storage.publish(storage.join(self._home, table_name(name)), table.to_bytes())
        parts.publish_part(self._home, number, written)
        return number, written
