"""From the labels of each shard of others to the classes of the set: only the whole set knows the numbers of names."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ddpm_dist import storage
from ddpm_dist.data.classes import check_names, sparse_numbers
from ddpm_dist.data.index import SampleTable, content_hash, table_name
from ddpm_dist.data.reading import REMEDY, Reading
from ddpm_dist.data.writer import WrittenShard
from ddpm_dist.errors import ConfigError

THREADS = 16


def settle_classes(
    home: str, written: Sequence[WrittenShard], reading: Reading
) -> tuple[list[WrittenShard], tuple[str, ...] | None]:
    """The shards with the class numbers of the set in their tables, and the names of the classes, sorted.

    Class numbers stay as they are, and nothing is written. For names, and for sparse numbers that become names, the
    tables are written anew, from the labels that the parts keep: doing it twice changes nothing.
    """
    written = list(written)
    labelled = [part for part in written if part.summary.labels]
    named = [part for part in labelled if part.summary.names]
    if named and len(named) < len(labelled):
        number = next(part for part in labelled if not part.summary.names)
        raise ConfigError(
            f"labels are names in {named[0].info.name} ({named[0].summary.names[0]}), numbers in {number.info.name}; "
            f"{REMEDY}"
        )
    if named:
        class_names = tuple(sorted({name for part in named for name in part.summary.names}))
        check_names(class_names, sum(part.info.samples for part in written))
        numbers = {name: number for number, name in enumerate(class_names)}
        changes = {id(part): [numbers[name] for name in part.summary.names] for part in named}
    else:
        sparse = sparse_numbers(
            (label for part in labelled for label in set(part.summary.labels or ())), reading.sparse
        )
        if sparse is None:
            return written, None
        class_names = tuple(map(str, sparse))
        places = np.zeros(sparse[-1] + 1, np.int64)
        places[sparse] = np.arange(len(sparse))
        changes = {id(part): places.tolist() for part in labelled}
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda part: _renumbered(home, part, changes.get(id(part))), written)), class_names


def _renumbered(home: str, part: WrittenShard, numbers: Sequence[int] | None) -> WrittenShard:
    """A shard whose table is written with `numbers[label]` for each label."""
    if numbers is None:
        return part
    place = storage.join(home, table_name(part.info.name))
    table = SampleTable.from_bytes(storage.read(place), part.info.name)
    rows = table.rows.copy()
    rows["label"] = [numbers[label] for label in part.summary.labels or ()]
    data = SampleTable(rows, table.keys).to_bytes()
    storage.publish(place, data)
    return WrittenShard(
        replace(part.info, table_hash=content_hash(data)),
        replace(part.summary, classes=int(rows["label"].max()) + 1),
    )
