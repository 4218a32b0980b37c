"""An index for WebDatasets that others wrote, and the check of any set that has one."""

import io
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ddpm_dist import storage
from ddpm_dist.data import parts, tar
from ddpm_dist.data.decode import BadSampleError, decode
from ddpm_dist.data.index import INDEX_NAME, TABLE_FOLDER, DataIndex, SampleTable, content_hash, load_index, table_name
from ddpm_dist.data.processes import default_workers, in_processes
from ddpm_dist.data.writer import index_tar, write_index
from ddpm_dist.errors import ConfigError, DataError, NotFoundError, ShardError

T = TypeVar("T")
log = logging.getLogger(__name__)

PROGRESS_S = 5.0
SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a data set."""

    shard: str
    what: str


def index_shards(
    url: str, *, label_field: str = "cls", workers: int | None = None, leave_out_damaged: bool = False
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
    finished = parts.finished_parts(url)
    missing = [number for number in range(len(names)) if number not in finished]
    if finished:
        log.info("index_shards: %d of %d shards were indexed before", len(finished), len(names))
    damaged: list[Problem] = []
    make = partial(_Indexer, url, names, label_field)
    for number, problem in _with_progress(
        in_processes(make, missing, workers or default_workers(sum(tars.values()))), len(missing)
    ):
        if problem:
            log.warning("index_shards: %s", problem)
            damaged.append(Problem(names[number], problem))
    if damaged and not leave_out_damaged:
        listed = "\n  ".join(problem.what for problem in damaged[:SHOWN])
        raise DataError(
            f"{len(damaged)} of {len(names)} shards can't be indexed:\n  {listed}\nrestore them and start this again, "
            f"or leave them out with --leave-out-damaged"
        )
    gone = {problem.shard for problem in damaged}
    good = [number for number, name in enumerate(names) if name not in gone]
    index = write_index(url, parts.read_parts(url, good))
    parts.delete_parts(url)
    return index


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
    whether the images decode.
    """
    index = load_index(url)
    problems: list[Problem] = []
    make, numbers = partial(_Verifier, index, decoded), range(len(index.shards))
    for found in _with_progress(in_processes(make, numbers, workers or default_workers(index.num_bytes)), len(numbers)):
        problems += found
    known = {shard.name for shard in index.shards}
    for name in storage.list_objects(url):
        if name.endswith(".tar") and name not in known:
            problems.append(Problem(name, "is not in the index: left out, or added later"))
    return problems


class _Verifier:
    def __init__(self, index: DataIndex, decoded: bool) -> None:
        self._index, self._decoded = index, decoded

    def __call__(self, number: int) -> list[Problem]:
        shard = self._index.shards[number]
        try:
            data = storage.read(storage.join(self._index.url, shard.name))
            table_data = storage.read(storage.join(self._index.url, table_name(shard.name)))
        except NotFoundError as error:
            return [Problem(shard.name, f"missing: {error}")]
        found = []
        if len(data) != shard.bytes:
            what = "truncated" if len(data) < shard.bytes else "altered"
            found.append(f"{what}: {len(data)} bytes, the index says {shard.bytes}")
        elif content_hash(data) != shard.hash:
            found.append("altered: its hash is not the one in the index")
        if content_hash(table_data) != shard.table_hash:
            found.append("its table is altered: its hash is not the one in the index")
        else:
            found += self._compare(shard.name, data, SampleTable.from_bytes(table_data, shard.name))
        return [Problem(shard.name, what) for what in found]

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


def _with_progress(results: Iterable[T], total: int) -> Iterator[T]:
    started = shown = time.monotonic()
    for number, result in enumerate(results, 1):
        yield result
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            rate = number / (shown - started)
            log.info("%d of %d shards, %.1f/s, %.0f s left", number, total, rate, (total - number) / rate)
