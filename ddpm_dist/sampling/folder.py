"""What a job's folder holds: the manifest, the receipts of finished units and what they mark, the images.

A receipt is believed only as long as what it marks is there.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from ddpm_dist import storage
from ddpm_dist.data import DecodedSample, ShardInfo, ShardSummary, WrittenShard, content_hash, iterate, table_name
from ddpm_dist.errors import NotFoundError, SamplingError, ShardError
from ddpm_dist.sampling.plan import MANIFEST, Manifest, Unit

log = logging.getLogger(__name__)

_THREADS = 16


@dataclass(frozen=True)
class Receipt:
    """What is known of a published unit."""

    written: WrittenShard
    digests: tuple[str, ...]
    """64 bits of a hash of each image's pixels, in hex: equal ones tell of images that were made twice."""

    def dump(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()

    @classmethod
    def load(cls, data: bytes) -> "Receipt":
        """Of `dump()`; SamplingError for what isn't one."""
        try:
            values = json.loads(data)
            summary = values["written"]["summary"]
            for name in {"min_size", "max_size", "names"} & summary.keys():  # those of 0.1.0 have no names
                summary[name] = tuple(summary[name])
            written = WrittenShard(ShardInfo(**values["written"]["info"]), ShardSummary(**summary))
            return cls(written, tuple(values["digests"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SamplingError(f"not a receipt of a unit: {type(error).__name__}: {error}") from None


def finished(out: str, units: Sequence[Unit], verify: bool = False) -> dict[Unit, Receipt]:
    """Units of a job's folder that are done: their receipt is there and whole, and so is what it tells of.

    One listing shows what was lost or cut since. verify: each shard and its table are read as well, and hashed, which
    shows what was altered. What is not as it was is said; it counts as missing.
    """
    there = storage.list_objects(out)
    marked = [unit for unit in units if unit.receipt in there]
    with ThreadPoolExecutor(_THREADS) as readers:
        found = dict(zip(marked, readers.map(partial(_read, out, there, verify), marked), strict=True))
    return {unit: receipt for unit, receipt in found.items() if receipt is not None}


def count_duplicates(receipts: Sequence[Receipt], first: int | None = None) -> int:
    """Images, of all or of the first so many, whose pixels are those of an earlier one."""
    digests = [digest for receipt in receipts for digest in receipt.digests][:first]
    return len(digests) - len(set(digests))


def load_manifest(out: str) -> Manifest | None:
    """The manifest of a job's folder; None if there is none."""
    url = storage.join(out, MANIFEST)
    try:
        return Manifest.model_validate_json(storage.read(url))
    except NotFoundError:
        return None
    except ValueError as error:
        raise SamplingError(
            f"{storage.redact(url)}: not the manifest of a sampling job: {error}; restore it, or use another folder"
        ) from None


def images_of(out: str) -> Iterator[DecodedSample]:
    """All images of finished samples, in order; SamplingError for an altered one."""
    try:
        yield from iterate(out)
    except ShardError as error:
        raise SamplingError(
            f"{error}. Images of a sampling job are made again by the same command with --verify"
        ) from None


def duplicates_in(out: str, manifest: Manifest, first: int) -> int | None:
    """As `count_duplicates`, of a job's folder; None if a receipt is lost, since then nobody knows."""
    units = [unit for unit in manifest.units if unit.start < first]
    there = finished(out, units)
    return count_duplicates([there[unit] for unit in units], first) if len(there) == len(units) else None


def _read(out: str, there: dict[str, int], verify: bool, unit: Unit) -> Receipt | None:
    place = storage.redact(out)
    try:
        receipt = Receipt.load(storage.read(storage.join(out, unit.receipt)))
    except NotFoundError:
        return None
    except SamplingError as error:
        log.warning("%s/%s: %s; its images are made again", place, unit.receipt, error)
        return None
    wrong = _what_is_wrong(out, there, verify, unit, receipt)
    if wrong:
        log.warning("%s/%s: its images are made again", place, wrong)
    return None if wrong else receipt


def _what_is_wrong(out: str, there: dict[str, int], verify: bool, unit: Unit, receipt: Receipt) -> str | None:
    info, count = receipt.written.info, unit.stop - unit.start
    if (info.name, info.samples, len(receipt.digests)) != (unit.shard, count, count):
        return f"{unit.receipt}: it tells of {info.samples} images in {info.name}"
    table = table_name(info.name)
    for name, size, digest in ((info.name, info.bytes, info.hash), (table, info.table_bytes, info.table_hash)):
        if name not in there:
            return f"{name}: lost"
        if there[name] != size:
            return f"{name}: {there[name]} bytes, {size} were written"
        if verify and content_hash(storage.read(storage.join(out, name))) != digest:
            return f"{name}: altered, its hash is not the one of its receipt"
    return None
