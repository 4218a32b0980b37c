"""An evaluation: samples against a data set or stored statistics, on the workers of a Ray cluster.

Samples come from a folder of shards, or straight from a snapshot, whose images are then thrown away. The
result, a JSON object, says what was compared with what, and warns of what makes numbers incomparable.
"""

import hashlib
import json
import logging
import time
from functools import partial
from typing import Any

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster import ActorPool
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data import load_index
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation import metrics
from ddpm_dist.evaluation.compare import Comparison, mean_bits_per_dim, nearest, prepare
from ddpm_dist.evaluation.order import BITS_PER_DIM, Order, check
from ddpm_dist.evaluation.result import ENOUGH, describe, publish, warnings
from ddpm_dist.evaluation.samples import count_of, sample_index, shape_of
from ddpm_dist.evaluation.worker import EvaluationWorker
from ddpm_dist.sampling import job as sampling_job

log = logging.getLogger(__name__)


def worker_factory(cluster: ClusterConfig) -> "partial[EvaluationWorker]":
    """Makes an EvaluationWorker on what the cluster's settings give to each worker."""
    return partial(EvaluationWorker, cluster)


def run(order: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, Any]:
    """Evaluates, publishes the result into order.out if it is given, and returns it."""
    check(order)
    # A folder that holds nothing is said before any worker starts.
    for name, url in (("data.url", order.data), ("--held-out", order.held_out)):
        if url is not None:
            load_index(url, name)
    if order.samples is not None:
        sample_index(order.samples)
    with ActorPool(worker_factory(cluster), workers, cluster) as pool:
        return evaluate(order, pool, workers[1], cluster)


def evaluate(order: Order, pool: ActorPool, most_workers: int, cluster: ClusterConfig) -> dict[str, Any]:
    """As `run`, with a pool that is there."""
    check(order)
    if order.samples is not None:
        index, manifest = sample_index(order.samples), sampling_job.load_manifest(order.samples)
        compare = prepare(order, pool, most_workers, shape_of(index, manifest, order.samples))
        return _evaluate(order, order.samples, compare)
    assert order.snapshot is not None
    info = snapshot.load_info(order.snapshot)
    compare = prepare(order, pool, most_workers, (info["image_size"], info["channels"]))
    samples = _temporary_folder(order)
    drawn = sampling_job.Order(
        order.snapshot,
        samples,
        order.num_samples or ENOUGH,
        order.seed,
        order.labels,
        order.sampling.model_copy(update={"format": "raw"}),
    )
    began = time.monotonic()
    sampling_job.run([drawn], (1, most_workers), cluster, pool)
    result = _evaluate(order, samples, compare, sampling_seconds=time.monotonic() - began)
    storage.discard(samples)
    return result


def _evaluate(order: Order, samples: str, compare: Comparison, sampling_seconds: float | None = None) -> dict[str, Any]:
    began = time.monotonic()
    index, manifest = load_index(samples), sampling_job.load_manifest(samples)
    count = count_of(order, index)
    data = load_index(order.data) if order.data else None
    networks = compare.networks
    references = compare.references(data) if compare.wanted else {}
    own = compare.summaries(samples, index.num_samples, halves=False, limit=count) if compare.wanted else {}
    values: dict[str, float] = {}
    for metric in compare.wanted:
        values |= metrics.compute(metric, networks[metric.network], own[metric.network], references[metric.network])
    if BITS_PER_DIM in order.metrics:
        values |= mean_bits_per_dim(order, manifest, compare)
    result = describe(order, samples, manifest, count, data, networks)
    result["metrics"] = values
    if order.out:
        result["grid"] = _copy_grid(order.out, result["name"], samples)
    if order.nearest and data is not None:
        result["nearest"] = nearest(order, compare, samples, data, result["name"])
    result["warnings"] = warnings(manifest, count, data, networks, compare.size)
    result["workers"] = compare.pool.alive
    result["seconds"] = round(time.monotonic() - began, 3)
    result["sampling_seconds"] = None if sampling_seconds is None else round(sampling_seconds, 3)
    for warning in result["warnings"]:
        log.warning("%s", warning)
    if order.out:
        publish(order.out, result)
    return result


def _temporary_folder(order: Order) -> str:
    """Where the images of a snapshot lie until they are evaluated: fixed, so that a killed job goes on."""
    assert order.snapshot is not None
    question = [snapshot.snapshot_id(order.snapshot), order.num_samples, order.seed, order.labels]
    question.append(order.sampling.model_dump_json())
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
    if order.out is None:
        raise EvaluationError("give --out URL: the images of a snapshot need a folder until they are evaluated")
    return storage.join(order.out, "unkept", digest)


def _copy_grid(out: str, name: str, samples: str) -> str | None:
    """The samples' grid picture beside the result, as the samples may go; None if they have none."""
    url = storage.join(out, "grids", f"{name}.png")
    try:
        storage.publish(url, storage.read(storage.join(samples, sampling_job.GRID)))
    except NotFoundError:
        return None
    return url
