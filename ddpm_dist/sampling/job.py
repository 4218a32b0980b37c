"""A sampling job: any number of images, spread over whatever is free, resumable at any point.

The folder of a job:

    manifest.json        what the job is; decides whether a folder may be gone on with
    samples-A-B.tar      images A … B − 1 (PNG or raw), one WebDataset shard per unit
    index/, index.json   so that `data/` streams them like any other set; index.json is written last
    receipts/A-B.json    a unit is done when its receipt is there, and what that tells of as well
    grid.png             the first images, for people
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import ddpm_dist
from ddpm_dist import snapshot, storage
from ddpm_dist.cluster import ActorPool, Done
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.data import write_index
from ddpm_dist.errors import SamplingError
from ddpm_dist.progress import Progress, counted
from ddpm_dist.sampling.folder import (
    Receipt,
    count_duplicates,
    finished,
    images_of,
    load_manifest as load_manifest,
)
from ddpm_dist.sampling.images import grid_png
from ddpm_dist.sampling.plan import MANIFEST, Fingerprint, Labels, Manifest, Unit, settle
from ddpm_dist.sampling.worker import Probe, ProbeTask, SampleWorker, UnitTask

log = logging.getLogger(__name__)

GRID_IMAGES = 64
GRID = "grid.png"
_THREADS = 16


@dataclass(frozen=True)
class Order:
    """One set of samples that is wanted; several in one job are a sweep."""

    snapshot: str
    out: str
    num_samples: int
    seed: int = 0
    labels: str | None = None
    """random, none, all, or classes such as 3 or 0,1,2; None: random for a conditional network."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class Result:
    """A finished set of samples."""

    out: str
    manifest: Manifest
    made: int
    """Images made by this call; the others were there."""
    duplicates: int
    """Images whose pixels are those of an earlier one."""
    grid: str


def run(
    orders: Sequence[Order],
    workers: tuple[int, int],
    cluster: ClusterConfig,
    pool: ActorPool | None = None,
    verify: bool = False,
) -> list[Result]:
    """Makes what is missing of all orders with one pool of workers, and finishes each folder.

    verify: shards that are there are read and hashed, and made again where they were altered; shards that were lost
    or cut are found in any case.

    Raises SamplingError naming the units that failed (all others are there then), ClusterError if no
    workers come, SnapshotError or StorageError before anything is written.
    """
    _check_distinct(orders)
    drafts = [_draft(order) for order in orders]
    if pool is not None:
        return _run(orders, drafts, pool, verify)
    with ActorPool(worker_factory(cluster), workers, cluster) as own:
        return _run(orders, drafts, own, verify)


def worker_factory(cluster: ClusterConfig) -> "partial[SampleWorker]":
    """Makes a SampleWorker on what the cluster's settings give to each worker."""
    return partial(SampleWorker, cluster)


def _run(orders: Sequence[Order], drafts: Sequence["_Draft"], pool: ActorPool, verify: bool) -> list[Result]:
    manifests = _settle_all(orders, drafts, pool)
    there = [finished(order.out, m.units, verify) for order, m in zip(orders, manifests, strict=True)]
    tasks: list[UnitTask] = []
    for order, manifest, done in zip(orders, manifests, there, strict=True):
        text = manifest.model_dump_json()
        tasks += [UnitTask(order.out, text, unit) for unit in manifest.units if unit not in done]
    made = _make(tasks, manifests, pool)
    return [
        _finish(order.out, manifest, done, made.get(order.out, {}))
        for order, manifest, done in zip(orders, manifests, there, strict=True)
    ]


def _make(tasks: Sequence[UnitTask], manifests: Sequence[Manifest], pool: ActorPool) -> dict[str, dict[Unit, Receipt]]:
    """Has all tasks done; returns {folder: {unit: its receipt}}."""
    made: dict[str, dict[Unit, Receipt]] = {}
    failed: list[str] = []
    total = sum(manifest.num_samples for manifest in manifests)
    wanted = sum(task.unit.stop - task.unit.start for task in tasks)
    if wanted < total:
        log.info("%s of %s images are there already", f"{total - wanted:,}", f"{total:,}")
    with Progress("sampling", "image", total, total - wanted) as progress:
        for outcome in pool.map(tasks):
            task = outcome.task
            if isinstance(outcome, Done):
                made.setdefault(task.out, {})[task.unit] = outcome.value
                progress.add(task.unit.stop - task.unit.start, counted(pool.alive, "worker"))
            else:
                failed.append(f"{task}: {outcome.error}")
                log.error("given up: %s", failed[-1])
    if failed:
        raise SamplingError(
            f"{len(failed)} of {len(tasks)} units failed, all others are there; the same command tries them again:\n  "
            + "\n  ".join(failed)
        )
    return made


@dataclass(frozen=True)
class _Draft:
    """An order, checked against its snapshot; what only a worker can tell is still open."""

    info: dict[str, Any]
    snapshot_id: str
    stored: Manifest | None


def _draft(order: Order) -> _Draft:
    if order.num_samples < 1:
        raise SamplingError(f"--num-samples {order.num_samples}: at least 1 is needed")
    info = snapshot.load_info(order.snapshot)
    _labels(order, info)
    if order.sampling.guide is not None:
        _check_guide(order.sampling.guide, info)
    elif info["null_label"] is None and order.sampling.guidance_scale != 1:
        kind = "is unconditional" if info["num_classes"] is None else "has no null class"
        raise SamplingError(
            f"sampling.guidance_scale: {order.sampling.guidance_scale}: this snapshot's network {kind}, it can't be "
            "guided by classes; use 1, or sampling.guide: URL of a worse snapshot"
        )
    storage.check_access(order.out, "--out")
    stored = load_manifest(order.out)
    if stored is None and storage.list_names(order.out):
        raise SamplingError(
            f"--out {storage.redact(order.out)}: holds objects, but no {MANIFEST} of a sampling job; use another --out"
        )
    return _Draft(info, snapshot.snapshot_id(order.snapshot), stored)


def _check_guide(url: str, info: dict[str, Any]) -> None:
    """SamplingError unless sampling.guide is a snapshot of the same kind of images."""
    theirs = snapshot.load_info(url)
    for name in ("image_size", "channels"):
        if theirs[name] != info[name]:
            raise SamplingError(
                f"sampling.guide: {storage.redact(url)} has {name} {theirs[name]}, the snapshot {info[name]}"
            )


def _settle_all(orders: Sequence[Order], drafts: Sequence[_Draft], pool: ActorPool) -> list[Manifest]:
    """Manifests to work by, published; a worker is asked for what a new job has to fix."""
    probes = {
        number: ProbeTask(order.snapshot, order.sampling.model_dump_json(), _at_least(order.num_samples))
        for number, (order, draft) in enumerate(zip(orders, drafts, strict=True))
        if draft.stored is None
    }
    # One worker answers for a whole sweep: what it says of itself has to be one.
    answers: dict[ProbeTask, Probe] = {}
    for outcome in pool.map(dict.fromkeys(probes.values())):
        if not isinstance(outcome, Done):
            raise outcome.error
        answers[outcome.task] = outcome.value
    manifests = []
    for number, (order, draft) in enumerate(zip(orders, drafts, strict=True)):
        if draft.stored is None:
            probe = answers[probes[number]]
            fingerprint, batch_size = probe.fingerprint, probe.batch_size
        else:
            fingerprint = draft.stored.fingerprint
            batch_size = order.sampling.batch_size or draft.stored.batch_size
        wanted = _manifest(order, draft, fingerprint, batch_size)
        manifests.append(_claim(order.out, draft.stored, wanted))
    return manifests


def _claim(out: str, stored: Manifest | None, wanted: Manifest) -> Manifest:
    """The settled manifest, in its place; of two jobs that begin at once, one's manifest holds for both."""
    url = storage.join(out, MANIFEST)
    if stored is None and not storage.create(url, wanted.dump()):
        stored = load_manifest(out)
    manifest = settle(stored, wanted, storage.redact(out))
    if stored is not None and manifest != stored:
        storage.publish(url, manifest.dump())
    return manifest


def _manifest(order: Order, draft: _Draft, fingerprint: Fingerprint, batch_size: int) -> Manifest:
    info = draft.info
    return Manifest(
        snapshot=order.snapshot,
        snapshot_id=draft.snapshot_id,
        step=info["step"],
        images_seen=info["images_seen"],
        kind=info["kind"],
        image_size=info["image_size"],
        channels=info["channels"],
        num_classes=info["num_classes"],
        seed=order.seed,
        num_samples=order.num_samples,
        labels=_labels(order, info).spec,
        sampling=order.sampling.model_copy(update={"batch_size": batch_size}),
        guide_id=order.sampling.guide and snapshot.snapshot_id(order.sampling.guide),
        fingerprint=fingerprint,
        versions={"ddpm_dist": ddpm_dist.__version__, "ray": version("ray"), "torch": str(torch.__version__)},
    )


def _labels(order: Order, info: dict[str, Any]) -> Labels:
    return Labels.parse(order.labels, info["num_classes"], has_null=info["null_label"] is not None)


def _finish(out: str, manifest: Manifest, there: Mapping[Unit, Receipt], made: Mapping[Unit, Receipt]) -> Result:
    """Index and grid, from the receipts of all units: those that were there, and those made now."""
    receipts = [made[unit] if unit in made else there[unit] for unit in manifest.units]
    duplicates = count_duplicates(receipts)
    if duplicates:
        log.warning(
            "%s: %d of %d images equal an earlier one, pixel by pixel",
            storage.redact(out), duplicates, manifest.num_samples,
        )  # fmt: skip
    about = {"made_by": "ddpm_dist sampling", "snapshot_id": manifest.snapshot_id, "seed": manifest.seed}
    write_index(out, [receipt.written for receipt in receipts], about=about)
    grid = storage.join(out, GRID)
    first = [torch.tensor(sample.image) for sample in itertools.islice(images_of(out), GRID_IMAGES)]
    storage.publish(grid, grid_png(torch.stack(first)))
    return Result(out, manifest, sum(unit.stop - unit.start for unit in made), duplicates, grid)


def _check_distinct(orders: Sequence[Order]) -> None:
    folders = [order.out.rstrip("/") for order in orders]
    for folder in folders:
        if folders.count(folder) > 1:
            raise SamplingError(
                f"--out {storage.redact(folder)}: two sets of samples of a job can't share it; is a value of --sweep, "
                "or the last part of two --snapshot, the same?"
            )


def _at_least(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()
