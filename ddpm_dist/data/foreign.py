"""An index for WebDatasets that others wrote, and the check of any set that has one."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ddpm_dist import storage
from ddpm_dist.data import parts, tar
from ddpm_dist.data.decode import BadSampleError, decode
from ddpm_dist.data.index import INDEX_NAME, TABLE_FOLDER, DataIndex, SampleTable, content_hash, load_index, table_name
from ddpm_dist.data.processes import default_workers, in_processes
from ddpm_dist.data.writer import index_tar, write_index
from ddpm_dist.errors import ConfigError, DataError, NotFoundError, ShardError
from ddpm_dist.progress import Progress, counted

log = logging.getLogger(__name__)

DEFAULT_LABEL = "cls"
LEFT_OUT = "left_out"
"""Key of an index's `about` under which index_shards keeps {shard: why it isn't in the index}."""
SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a data set."""

    shard: str
    what: str


def index_shards(
    url: str, *, label_field: str = DEFAULT_LABEL, workers: int | None = None, leave_out_damaged: bool = False
) -> DataIndex:
    """Writes the index of all tars below a URL; started again, it goes on with those that have no table yet.

    label_field: extension of the member with the class number, or `json:FIELD` for a field of the .json member.
    Damaged shards are a DataError that lists them, or are left out.
    """
    storage.check_access(url)
    if storage.exists(storage.join(url, INDEX_NAME)):
        raise ConfigError(
            f"{storage.redact(url)}: has an index already; tools/verify_shards.py checks it. To make another one, "
            f"delete {INDEX_NAME} and the folder {TABLE_FOLDER}"
        )
    tars = {name: size for name, size in storage.list_objects(url).items() if name.endswith(".tar")}
    names = list(tars)
    if not names:
        raise NotFoundError(f"{storage.redact(url)}: no .tar is there")
    finished = _finished(url, tars, label_field)
    missing = [number for number in range(len(names)) if number not in finished]
    if finished:
        log.info("index_shards: %d of %s were indexed before", len(finished), counted(len(names), "shard"))
    damaged: dict[str, str] = {}
    make = partial(_Indexer, url, names, label_field)
    with Progress("index_shards", "shard", len(names), len(finished)) as progress:
        for number, problem in in_processes(make, missing, workers or default_workers(sum(tars.values()))):
            progress.add()
            if problem:
                log.warning("index_shards: %s", problem)
                damaged[names[number]] = problem
    if damaged and (not leave_out_damaged or len(damaged) == len(names)):
        listed = "\n  ".join(list(damaged.values())[:SHOWN])
        raise DataError(
            f"{len(damaged)} of {counted(len(names), 'shard')} can't be indexed:\n  {listed}\nrestore them and start "
            f"this again, or leave them out with --leave-out-damaged (but not all)"
        )
    written = parts.read_parts(url, [number for number, name in enumerate(names) if name not in damaged])
    if label_field != DEFAULT_LABEL and not any(part.summary.classes for part in written):
        extension = label_field.partition(":")[0]
        raise DataError(f"--label {label_field}: no sample has a member .{extension}; `tar tf` shows what there is")
    index = write_index(url, written, about={LEFT_OUT: damaged} if damaged else None)
    parts.delete_parts(url)
    return index


def _finished(url: str, tars: Mapping[str, int], label_field: str) -> set[int]:
    """Numbers of the shards that an earlier start indexed: with the same labels, and as they are now."""
    asked = storage.join(url, parts.PARTS_FOLDER, "label")
    if not storage.create(asked, label_field.encode()) and storage.read(asked) != label_field.encode():
        parts.delete_parts(url)
        storage.create(asked, label_field.encode())
    now = list(tars.items())
    numbers = [number for number in sorted(parts.finished_parts(url)) if number < len(now)]
    before = [(part.info.name, part.info.bytes) for part in parts.read_parts(url, numbers)]
    return {number for number, shard in zip(numbers, before, strict=True) if shard == now[number]}


class _Indexer:
    def __init__(self, url: str, names: Sequence[str], label_field: str) -> None:
        self._url, self._names, self._label_field = url, names, label_field

    def __call__(self, number: int) -> tuple[int, str | None]:
        name = self._names[number]
        try:
            written, table = index_tar(name, storage.read(storage.join(self._url, name)), self._label_field)
        except DataError as error:
            return number, str(error)
        storage.publish(storage.join(self._url, table_name(name)), table.to_bytes())
        parts.publish_part(self._url, number, written)
        return number, None


def verify_shards(url: str, *, workers: int | None = None, decoded: bool = True) -> list[Problem]:
    """All that is wrong with a data set that has an index; nothing is changed.

    Each shard's size and hash, its table's hash, the table against the tar as plain WebDataset reads it, and
    whether the images decode. What index_shards left out is no problem, but said in the log.
    """
    index = load_index(url)
    problems: list[Problem] = []
    make, numbers = partial(_Verifier, index, decoded), range(len(index.shards))
    with Progress("verify_shards", "shard", len(numbers)) as progress:
        for found in in_processes(make, numbers, workers or default_workers(index.num_bytes)):
            progress.add()
            problems += found
    known = {shard.name for shard in index.shards}
    left_out = index.about.get(LEFT_OUT, {})
    for name in storage.list_objects(url):
        if name in left_out:
            log.info("verify_shards: left out when the set was indexed: %s", left_out[name])
        elif name.endswith(".tar") and name not in known:
            problems.append(Problem(name, "is not in the index; to add it, index the set anew (tools/index_shards.py)"))
    return problems


class _Verifier:
    def __init__(self, index: DataIndex, decoded: bool) -> None:
        self._index, self._decoded = index, decoded

    def __call__(self, number: int) -> list[Problem]:
        shard = self._index.shards[number]
        data, table = self._read(shard.name), self._read(table_name(shard.name))
        found = []
        if data is None:
            found.append("missing, but in the index")
        elif len(data) != shard.bytes:
            what = "truncated" if len(data) < shard.bytes else "altered"
            found.append(f"{what}: {len(data)} bytes, the index says {shard.bytes}")
        elif content_hash(data) != shard.hash:
            found.append("altered: its hash is not the one in the index")
        if table is None or content_hash(table) != shard.table_hash:
            what = "missing" if table is None else "altered: its hash is not the one in the index"
            found.append(f"its table {table_name(shard.name)} is {what}")
        elif data is not None:
            found += self._compare(shard.name, data, SampleTable.from_bytes(table, shard.name))
        return [Problem(shard.name, what) for what in found]

    def _read(self, name: str) -> bytes | None:
        try:
            return storage.read(storage.join(self._index.url, name))
        except NotFoundError:
            return None

    def _compare(self, name: str, data: bytes, table: SampleTable) -> Iterator[str]:
        try:
            tar.walk(data, name)
        except ShardError as error:
            yield str(error).removeprefix(f"{name}: ")
            return
        samples = list(tar.read_tar(io.BytesIO(data), name))
        if len(samples) != len(table.rows):
            yield f"WebDataset reads {len(samples)} samples, the table has {len(table.rows)}"
            return
        for number, sample in enumerate(samples):
            row, key = table.rows[number], table.key(number)
            start = int(row["offset"])
            image = data[start : start + int(row["size"])]
            if sample["__key__"] != key or (image and image not in sample.values()):
                yield f"sample {key} is not the one that WebDataset reads there ({sample['__key__']})"
                return
            if self._decoded:
                try:
                    decode(image)
                except BadSampleError as error:
                    yield f"sample {key} can't be decoded: {error}"
