"""The check of a data set against its index: the judge of what can be trained on."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ddpm_dist import storage
from ddpm_dist.data import tar
from ddpm_dist.data.decode import BadSampleError, decode
from ddpm_dist.data.index import KEYS, LEFT_OUT, DataIndex, SampleTable, content_hash, load_index, table_name
from ddpm_dist.data.plans import PLAN_NAME, plan_at
from ddpm_dist.data.processes import default_workers, in_processes
from ddpm_dist.data.sources.base import reading as explained
from ddpm_dist.errors import DataError, NotFoundError, ShardError
from ddpm_dist.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a data set."""

    shard: str
    what: str


def verify_shards(
    url: str, *, at: str | None = None, workers: int | None = None, decoded: bool = True
) -> list[Problem]:
    """All that is wrong with a data set that has an index; nothing is changed.

    Each shard's size and hash, its table's hash, the table against the tar as plain WebDataset reads it, and
    whether the images decode; the set against its plan, if make_shards made it. What index_shards left out is no
    problem, but said in the log. at: folder of the index, if it isn't with the shards.
    """
    index = load_index(url, at=at)
    problems: list[Problem] = []
    make, numbers = partial(_Verifier, index, decoded), range(len(index.shards))
    with Progress("verify_shards", "shard", len(numbers)) as progress:
        for found in in_processes(make, numbers, workers or default_workers(index.num_bytes)):
            progress.add()
            problems += found
    plan = plan_at(url)
    lacks = plan.misses({shard.name: shard.samples for shard in index.shards}) if plan else None
    if lacks:
        problems.append(
            Problem(PLAN_NAME, f"{lacks}: the index was made while make_shards hadn't finished; its command says more")
        )
    known = {shard.name for shard in index.shards}
    left_out = index.about.get(LEFT_OUT, {})
    plain_http = url.startswith(("http://", "https://"))  # which lists nothing
    for name in {} if plain_http else storage.list_objects(url):
        if name in left_out:
            log.info("verify_shards: left out when the set was indexed: %s", left_out[name])
        elif name.endswith(".tar") and name not in known and not tar.is_clutter(name):
            problems.append(Problem(name, "is not in the index; to add it, index the set anew (ddpm-shards index)"))
    return problems


class _Verifier:
    def __init__(self, index: DataIndex, decoded: bool) -> None:
        self._index, self._decoded = index, decoded
        self._split = tar.KEYS[index.about.get(KEYS, tar.FIRST_DOT)]

    def __call__(self, number: int) -> list[Problem]:
        shard = self._index.shards[number]
        data, table = self._read(self._index.url, shard.name), self._read(self._index.home, table_name(shard.name))
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
            try:
                with explained(shard.name, "a shard that can be checked"):
                    found += self._compare(shard.name, data, table)
            except DataError as error:
                found.append(str(error).removeprefix(f"{shard.name}: "))
        return [Problem(shard.name, what) for what in found]

    def _read(self, folder: str, name: str) -> bytes | None:
        try:
            return storage.read(storage.join(folder, name))
        except NotFoundError:
            return None

    def _compare(self, name: str, data: bytes, table_data: bytes) -> Iterator[str]:
        try:
            table = SampleTable.from_bytes(table_data, name)
            tar.walk(data, name, self._split)
        except (ShardError, DataError) as error:
            yield str(error).removeprefix(f"{name}: ")
            return
        try:
            samples = list(tar.read_tar(io.BytesIO(data), name, self._split))
        except Exception as error:  # WebDataset's and tarfile's own, of every kind
            yield f"WebDataset can't read it: {error.args[0] if error.args else type(error).__name__}"
            return
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
            if not image and b"" not in sample.values():
                members = ", ".join(f".{extension}" for extension in sample if not extension.startswith("__"))
                yield f"sample {key} has no image; it holds {members}"
            elif self._decoded:
                try:
                    decode(image)
                except BadSampleError as error:
                    yield f"sample {key} can't be decoded: {error}"
