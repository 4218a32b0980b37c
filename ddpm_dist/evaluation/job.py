"""An evaluation: samples against a data set or stored statistics, on the workers of a Ray cluster.

Samples come from a folder of shards, or straight from a snapshot, whose images are then thrown away. The
result, a JSON object, says what was compared with what, and warns of what makes numbers incomparable.
"""

import logging
import time
from functools import partial
from typing import Any

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster import ActorPool
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data import load_index
from ddpm_dist.errors import DdpmDistError, EvaluationError, NotFoundError, SamplingError, WorkerRefusedError
from ddpm_dist.evaluation import metrics
from ddpm_dist.evaluation.compare import Comparison, mean_bits_per_dim, nearest, prepare
from ddpm_dist.evaluation.order import BITS_PER_DIM, Order, check
from ddpm_dist.evaluation.question import Question, ask, drawn_by, drawn_for
from ddpm_dist.evaluation.result import (
    ENOUGH,
    answer_url,
    check_finite,
    describe,
    publish,
    read_result,
    unkept,
)
from ddpm_dist.evaluation.samples import count_of, sample_index, shape_of
from ddpm_dist.evaluation.warnings import floors_of, warnings
from ddpm_dist.evaluation.worker import EvaluationWorker
from ddpm_dist.sampling import duplicates_in, job as sampling_job

log = logging.getLogger(__name__)


def worker_factory(cluster: ClusterConfig) -> "partial[EvaluationWorker]":
    """Makes an EvaluationWorker on what the cluster's settings give to each worker."""
    return partial(EvaluationWorker, cluster)


def run(order: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, Any]:
    """Evaluates, publishes the result into order.out if it is given, and returns it."""
    check(order)
    # A folder that holds nothing is said before any worker starts.
    order.data_set()
    if order.held_out is not None:
        order.likelihood_set()
    if order.samples is not None:
        sample_index(order.samples)
    with ActorPool(worker_factory(cluster), workers, cluster) as pool:
        return evaluate(order, pool, workers[1], cluster)


def evaluate(order: Order, pool: ActorPool, most_workers: int, cluster: ClusterConfig) -> dict[str, Any]:
    """As `run`, with a pool that is there."""
    check(order)
    if order.snapshot is not None:
        return _from_snapshot(order, pool, most_workers, cluster)
    assert order.samples is not None
    index, manifest = sample_index(order.samples), sampling_job.load_manifest(order.samples)
    compare = prepare(order, pool, most_workers, shape_of(index, manifest, order.samples))
    question = ask(order, count_of(order, index), compare.shape, drawn_by(manifest), compare.networks)
    return _evaluate(order, order.samples, compare, question, manifest.snapshot_id if manifest else index.content_id)


def _from_snapshot(order: Order, pool: ActorPool, most_workers: int, cluster: ClusterConfig) -> dict[str, Any]:
    """Draws the samples into a folder of this question's own, and removes that and nothing else."""
    assert order.snapshot is not None
    if order.out is None:
        raise EvaluationError("give --out URL: the images of a snapshot need a folder until they are evaluated")
    info, subject = snapshot.load_info(order.snapshot), snapshot.snapshot_id(order.snapshot)
    compare = prepare(order, pool, most_workers, (info["image_size"], info["channels"]))
    drawn = drawn_for(order, info["num_classes"], has_null=info["null_label"] is not None)
    question = ask(order, order.num_samples or ENOUGH, compare.shape, drawn, compare.networks)
    answer = answer_url(order.out, question, subject)
    samples = unkept(order.out, question, subject)
    sampling = order.sampling.model_copy(update={"format": "raw"})
    wanted = sampling_job.Order(order.snapshot, samples, question.count, order.seed, order.labels, sampling)
    before, began = answer and storage.read(answer), time.monotonic()
    try:
        _draw(wanted, most_workers, cluster, pool)
        result = _evaluate(order, samples, compare, question, subject, time.monotonic() - began)
    except DdpmDistError as error:
        # Another evaluation of the same question shares the folder; it removes it once it has published the answer.
        answer = answer_url(order.out, question, subject)
        if answer is None or storage.read(answer) == before:
            raise
        log.info("%s: another evaluation has answered this question meanwhile (here: %s)", samples, error)
        result = read_result(answer)
    storage.discard(samples)
    return result


def _draw(wanted: sampling_job.Order, most_workers: int, cluster: ClusterConfig, pool: ActorPool) -> None:
    """The images; those of an evaluation that was killed are gone on with where these workers make the same ones."""
    begun = bool(storage.list_names(wanted.out))
    if begun and not _is_whole(wanted.out):
        storage.delete_tree(wanted.out)
    try:
        sampling_job.run([wanted], (1, most_workers), cluster, pool)
    except WorkerRefusedError as error:
        if not begun:
            raise
        log.warning("the images of an evaluation that was broken off are drawn anew: %s", error)
        storage.delete_tree(wanted.out)
        sampling_job.run([wanted], (1, most_workers), cluster, pool)


def _is_whole(samples: str) -> bool:
    """Whether images can be gone on with: a worker may have written some after their folder was removed."""
    try:
        return sampling_job.load_manifest(samples) is not None
    except SamplingError as error:
        log.warning("%s; the images are drawn anew", error)
        return False


def _evaluate(
    order: Order,
    samples: str,
    compare: Comparison,
    question: Question,
    subject: str,
    sampling_seconds: float | None = None,
) -> dict[str, Any]:
    began = time.monotonic()
    index, manifest = load_index(samples), sampling_job.load_manifest(samples)
    if manifest is None and order.snapshot is not None:
        raise EvaluationError(f"{storage.redact(samples)}: its manifest was taken away while the images were drawn")
    count = question.count
    data = order.data_set()
    networks = compare.networks
    references = compare.references(data, count) if compare.wanted else {}
    own = compare.summaries(samples, index.num_samples, halves=False, limit=count) if compare.wanted else {}
    values: dict[str, dict[str, float]] = {}
    for metric in compare.wanted:
        values[str(metric)] = metrics.compute(
            metric, networks[metric.network], own[metric.network], references[metric.network]
        )
    if BITS_PER_DIM in order.metrics:
        values[BITS_PER_DIM] = mean_bits_per_dim(order, manifest, compare)
    result = describe(order, samples, manifest, count, data, networks, question, subject)
    result["metrics"] = {name: value for metric in question.metrics for name, value in values[metric].items()}
    result["answers"] = {name: question.of_metric(metric) for metric, found in values.items() for name in found}
    check_finite(result["metrics"])
    if order.out:
        result["grid"] = _copy_grid(order.out, result["name"], samples)
    if order.nearest and data is not None:
        result["nearest"] = nearest(order, compare, samples, data, result["name"])
    result["reference"]["floors"] = floors_of(references)
    result["duplicates"] = None if manifest is None else duplicates_in(samples, manifest, count)
    result["warnings"] = warnings(order, result, manifest, data, compare)
    result["workers"] = compare.pool.alive
    result["seconds"] = round(time.monotonic() - began, 3)
    result["sampling_seconds"] = None if sampling_seconds is None else round(sampling_seconds, 3)
    result["finished_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for warning in result["warnings"]:
        log.warning("%s", warning)
    if order.out:
        publish(order.out, result)
    return result


def _copy_grid(out: str, name: str, samples: str) -> str | None:
    """The samples' grid picture beside the result, as the samples may go; None if they have none."""
    url = storage.join(out, "grids", f"{name}.png")
    try:
        storage.publish(url, storage.read(storage.join(samples, sampling_job.GRID)))
    except NotFoundError:
        return None
    return url
