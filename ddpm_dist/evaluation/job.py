"""An evaluation: samples against a data set or stored statistics, on the workers of a Ray cluster.

Samples come from a folder of shards, or straight from a snapshot, whose images are then thrown away. The
result, a JSON object, says what was compared with what, and warns of what makes numbers incomparable.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import ddpm_dist
from ddpm_dist import snapshot, storage
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.data.index import DataIndex, load_index
from ddpm_dist.distributed.ray_pool import ActorPool, Failed
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import metrics, statistics
from ddpm_dist.evaluation.features import FeatureNetwork, open_network
from ddpm_dist.evaluation.metrics import Reference
from ddpm_dist.evaluation.moments import Summary
from ddpm_dist.evaluation.worker import EvaluationWorker, LikelihoodTask, SetPart, SummaryTask
from ddpm_dist.sampling import job as sampling_job
from ddpm_dist.sampling.plan import Manifest
from ddpm_dist.sampling.progress import Progress

log = logging.getLogger(__name__)

EVERYTHING = 2**62
PART_IMAGES = 512
BITS_PER_DIM = "bits_per_dim"
LOSSY = ("jpeg", "webp")
ENOUGH = 10_000
"""Samples below which published numbers of Fréchet distances are not comparable (their bias is large)."""


@dataclass(frozen=True)
class Order:
    """What to evaluate. One of samples and snapshot, and one of data and reference, must be given."""

    samples: str | None = None
    """Folder of sample shards."""
    snapshot: str | None = None
    """Snapshot to draw samples from; they are deleted afterwards."""
    data: str | None = None
    """Data set to compare with."""
    reference: str | None = None
    """Statistics file (.npz) to compare with, instead of a data set."""
    held_out: str | None = None
    """Data set for bits_per_dim; default: data."""
    metrics: tuple[str, ...] = ("frechet_pixel", "frechet_lite0")
    networks: Mapping[str, str] = field(default_factory=dict)
    """{name: URL} of feature networks beside pixel and lite0."""
    num_samples: int | None = None
    """Samples to use, from the first; default: all that are there, or 10,000 from a snapshot."""
    seed: int = 0
    labels: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    out: str | None = None
    """Evaluation folder for the result, as of a run."""


def worker_factory(cluster: ClusterConfig) -> "partial[EvaluationWorker]":
    """Makes an EvaluationWorker on what the cluster's settings give to each worker."""
    device = "cuda" if cluster.gpus_per_worker else "cpu"
    return partial(EvaluationWorker, max(1, int(cluster.cpus_per_worker)), device)


def run(order: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, Any]:
    """Evaluates, publishes the result into order.out if it is given, and returns it."""
    _check(order)
    with ActorPool(worker_factory(cluster), workers, cluster) as pool:
        return evaluate(order, pool, workers[1], cluster)


def evaluate(order: Order, pool: ActorPool, most_workers: int, cluster: ClusterConfig) -> dict[str, Any]:
    """As `run`, with a pool that is there."""
    _check(order)
    if order.samples is not None:
        return _evaluate(order, order.samples, pool, most_workers)
    assert order.snapshot is not None
    samples = _temporary_folder(order)
    drawn = sampling_job.Order(
        order.snapshot,
        samples,
        order.num_samples or ENOUGH,
        order.seed,
        order.labels,
        order.sampling.model_copy(update={"format": "raw"}),
    )
    sampling_job.run([drawn], (1, most_workers), cluster, pool)
    result = _evaluate(order, samples, pool, most_workers)
    storage.delete_tree(samples)
    return result


def _evaluate(order: Order, samples: str, pool: ActorPool, most_workers: int) -> dict[str, Any]:
    began = time.monotonic()
    wanted = metrics.parse(name for name in order.metrics if name != BITS_PER_DIM)
    index, manifest = load_index(samples), sampling_job.load_manifest(samples)
    size, channels = _shape(index, manifest, samples)
    count = _count(order, index)
    specs = _specs(wanted, order.networks)
    networks = {name: open_network(spec, (channels, size, size)) for name, spec in specs.items()}
    keep = metrics.KEPT if any(metric.kind in metrics.NEEDS_KEPT for metric in wanted) else 0
    compare = _Comparison(pool, most_workers, specs, networks, keep, size, channels)
    data = load_index(order.data) if order.data else None
    references = compare.references(order, data) if wanted else {}
    own = compare.summaries(samples, index.num_samples, halves=False, limit=count) if wanted else {}
    values: dict[str, float] = {}
    for metric in wanted:
        values |= metrics.compute(metric, networks[metric.network], own[metric.network], references[metric.network])
    if BITS_PER_DIM in order.metrics:
        values |= _bits_per_dim(order, manifest, compare)
    result = _describe(order, samples, manifest, count, data, networks)
    result["metrics"] = values
    result["warnings"] = _warnings(order, manifest, count, data, networks, references, size)
    result["seconds"] = round(time.monotonic() - began, 3)
    for warning in result["warnings"]:
        log.warning("%s", warning)
    if order.out:
        publish(order.out, result)
    return result


@dataclass(frozen=True)
class _Comparison:
    """How sets are summed in this evaluation."""

    pool: ActorPool
    most_workers: int
    specs: Mapping[str, str]
    networks: Mapping[str, FeatureNetwork]
    keep: int
    size: int
    channels: int

    def parts(self, url: str, count: int) -> list[SetPart]:
        """Parts of a set, enough for all workers and small enough to be done again."""
        number = max(1, min(-(-count // PART_IMAGES), 4 * self.most_workers))
        return [SetPart(url, (k, number), self.size, self.channels) for k in range(number)]

    def references(self, order: Order, data: DataIndex | None) -> dict[str, Reference]:
        """Stored ones where they are, computed and stored ones else."""
        if order.reference is not None:
            given = statistics.load_given(order.reference, self.size)
            return dict.fromkeys(self.networks, given)
        assert data is not None
        urls = {
            name: statistics.statistics_url(data.url, data.content_id, self.size, self.channels, network, self.keep)
            for name, network in self.networks.items()
        }
        stored = {name: statistics.load(url) for name, url in urls.items()}
        found: dict[str, Reference] = {name: summary for name, summary in stored.items() if summary is not None}
        missing = [name for name in self.networks if name not in found]
        if missing:
            made = self.summaries(data.url, data.num_samples, halves=True, only=missing)
            for name, summary in made.items():
                statistics.save(urls[name], summary)
            found |= made
        return found

    def summaries(
        self, url: str, count: int, *, halves: bool, limit: int = EVERYTHING, only: Sequence[str] | None = None
    ) -> dict[str, Summary]:
        """{network: summary} of a set, merged as its parts come in."""
        names = list(self.networks if only is None else only)
        specs = {self.specs[name]: name for name in names}
        tasks = [SummaryTask(part, tuple(specs), halves, self.keep, limit) for part in self.parts(url, count)]
        whole: dict[str, Summary] = {}
        progress = Progress(f"features of {storage.redact(url)}", min(count, limit))
        for outcome in self.pool.map(tasks):
            if isinstance(outcome, Failed):
                raise EvaluationError(f"{outcome.task}: {outcome.error}")
            done = 0
            for spec, summary in outcome.value.items():
                done = summary.count
                if specs[spec] in whole:
                    whole[specs[spec]].merge(summary)
                else:
                    whole[specs[spec]] = summary
            progress.add(done, self.pool.alive)
        for name, summary in whole.items():
            if summary.count != min(count, limit):
                raise EvaluationError(f"{url}: {summary.count} images came for {min(count, limit)} in {name}")
        return whole


def _bits_per_dim(order: Order, manifest: Manifest | None, compare: _Comparison) -> dict[str, float]:
    url, from_snapshot = order.held_out or order.data, order.snapshot or (manifest.snapshot if manifest else None)
    if url is None or from_snapshot is None:
        raise EvaluationError(f"{BITS_PER_DIM}: needs a snapshot and --held-out (or --data)")
    total = load_index(url).num_samples
    tasks = [LikelihoodTask(part, from_snapshot, order.seed, EVERYTHING) for part in compare.parts(url, total)]
    progress = Progress("bits/dim", total)
    images, bits, prior = 0, 0.0, 0.0
    for outcome in compare.pool.map(tasks):
        if isinstance(outcome, Failed):
            raise EvaluationError(f"{outcome.task}: {outcome.error}")
        images, bits, prior = images + outcome.value[0], bits + outcome.value[1], prior + outcome.value[2]
        progress.add(outcome.value[0], compare.pool.alive)
    return {BITS_PER_DIM: bits / images, f"{BITS_PER_DIM}_prior": prior / images}


def _describe(
    order: Order,
    samples: str,
    manifest: Manifest | None,
    count: int,
    data: DataIndex | None,
    networks: Mapping[str, FeatureNetwork],
) -> dict[str, Any]:
    """What was compared with what."""
    reference: dict[str, Any] = {"statistics": order.reference}
    if data is not None:
        reference = {"data": data.url, "content_id": data.content_id, "num_samples": data.num_samples, "flips": False}
        reference["floor"] = f"between two halves of {data.num_samples // 2} images"
    return {
        "name": _name(manifest, count, data, order),
        "samples": samples if order.samples else None,
        "num_samples": count,
        "snapshot": manifest.snapshot if manifest else None,
        "snapshot_id": manifest.snapshot_id if manifest else None,
        "step": manifest.step if manifest else None,
        "images_seen": manifest.images_seen if manifest else None,
        "weights": manifest.kind if manifest else None,
        "seed": manifest.seed if manifest else None,
        "sampling": manifest.sampling.model_dump(mode="json") if manifest else None,
        "reference": reference,
        "networks": {n.name: {"hash": n.hash, "features": n.dim, "resize": n.resize} for n in networks.values()},
        "versions": {
            "ddpm_dist": ddpm_dist.__version__,
            "torch": str(torch.__version__),
            "ray": version("ray"),
        },
    }


def _name(manifest: Manifest | None, count: int, data: DataIndex | None, order: Order) -> str:
    """Says the step, the numbers of images and the reference; one name for one question."""
    step = f"{manifest.step:09d}" if manifest and manifest.step is not None else "samples"
    if data is not None:
        place, against = data.url, f"{data.num_samples}-of-{data.content_id[:8]}"
    else:
        place = order.reference or ""
        against = place.rpartition("/")[2].removesuffix(".npz")
    question = [manifest.model_dump_json() if manifest else order.samples, place, order.metrics, order.held_out]
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:8]
    return f"{step}-{count}-against-{against}-{digest}"


def _warnings(
    order: Order,
    manifest: Manifest | None,
    count: int,
    data: DataIndex | None,
    networks: Mapping[str, FeatureNetwork],
    references: Mapping[str, Reference],
    size: int,
) -> list[str]:
    found = []
    if count < ENOUGH:
        found.append(
            f"{count} samples are few: a Fréchet distance grows with fewer; papers use 50,000, at least {ENOUGH}"
        )
    for network in networks.values():
        sizes = [count] if data is None else [count, data.num_samples // 2]
        if min(sizes) <= network.dim:
            found.append(
                f"{network.name}: {min(sizes)} images (of samples or of a half of the reference) in {network.dim} "
                "dimensions: the covariance is singular and the distance has a high floor"
            )
    if manifest is None:
        found.append("the samples have no manifest: weights, sampler and duplicates are unknown")
    elif manifest.kind != "ema":
        found.append(f"the weights are {manifest.kind or 'of an unknown kind'}, not EMA: distances are much larger")
    if data is not None:
        lossy = {name: number for name, number in data.schema.formats.items() if name in LOSSY}
        if lossy:
            found.append(f"the reference is lossy ({lossy}): its artefacts count as differences")
        sides = {*data.schema.min_size, *data.schema.max_size} - {size}
        if sides:
            found.append(
                f"the reference's images of {min(sides)} to {max(sides)} px were resized and cropped to {size} px, as "
                "training does"
            )
    else:
        found.append("no floor: the reference is a statistics file without images")
    return found


def publish(folder: str, result: Mapping[str, Any]) -> str:
    """Writes `results/<name>.json` and the collection `results.jsonl` of an evaluation folder; returns the URL."""
    url = storage.join(folder, "results", f"{result['name']}.json")
    storage.publish(url, (json.dumps(result, indent=2) + "\n").encode())
    lines = [json.dumps(found) for found in results(folder)]
    storage.publish(storage.join(folder, "results.jsonl"), ("\n".join(lines) + "\n").encode())
    return url


def results(folder: str) -> list[dict[str, Any]]:
    """All results of an evaluation folder, by name: that is, by step."""
    names = storage.list_names(storage.join(folder, "results"))
    return [json.loads(storage.read(storage.join(folder, "results", name))) for name in names]


def _check(order: Order) -> None:
    """Raises EvaluationError for orders that can't be carried out."""
    if (order.samples is None) == (order.snapshot is None):
        raise EvaluationError("give one of --samples and --snapshot: what is to be evaluated")
    if (order.data is None) == (order.reference is None):
        raise EvaluationError("give one of --data and --reference: what it is compared with")
    wanted = metrics.parse(name for name in order.metrics if name != BITS_PER_DIM)
    if not order.metrics:
        raise EvaluationError("evaluation.metrics: empty; name at least one, such as frechet_lite0")
    _specs(wanted, order.networks)


def _specs(wanted: Sequence[metrics.Metric], urls: Mapping[str, str]) -> dict[str, str]:
    """{network name: what `open_network` reads}; EvaluationError if a network's weights are not named."""
    specs = {}
    for metric in wanted:
        name = metric.network
        if name not in ("pixel", "lite0") and name not in urls:
            raise EvaluationError(
                f"{name}: where are its weights? Give --network {name}=URL (known without one: pixel, lite0)"
            )
        specs[name] = f"{name}={urls[name]}" if name in urls else name
    return specs


def _shape(index: DataIndex, manifest: Manifest | None, samples: str) -> tuple[int, int]:
    """(size, channels) of the samples."""
    if manifest is not None:
        return manifest.image_size, manifest.channels
    sides = {*index.schema.min_size, *index.schema.max_size}
    if len(sides) != 1:
        raise EvaluationError(
            f"--samples {storage.redact(samples)}: images of {min(sides)} to {max(sides)} px; one is needed"
        )
    return sides.pop(), 3


def _count(order: Order, index: DataIndex) -> int:
    count = order.num_samples or index.num_samples
    if count > index.num_samples:
        raise EvaluationError(f"--num-samples {count}: {storage.redact(index.url)} has {index.num_samples}; draw more")
    return count


def _temporary_folder(order: Order) -> str:
    """Where the images of a snapshot lie until they are evaluated: fixed, so that a killed job goes on."""
    assert order.snapshot is not None
    question = [snapshot.snapshot_id(order.snapshot), order.num_samples, order.seed, order.labels]
    question.append(order.sampling.model_dump_json())
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
    if order.out is None:
        raise EvaluationError("give --out URL: the images of a snapshot need a folder until they are evaluated")
    return storage.join(order.out, "unkept", digest)
