"""Passes over whole sets, in parts on all workers: sums of features, bits/dim, nearest images."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddpm_dist import storage
from ddpm_dist.cluster import ActorPool, Failed
from ddpm_dist.data import DataIndex, iterate
from ddpm_dist.errors import DdpmDistError, EvaluationError, UnreachableError
from ddpm_dist.evaluation import metrics, statistics
from ddpm_dist.evaluation.features import FeatureNetwork, open_network
from ddpm_dist.evaluation.given import load_given
from ddpm_dist.evaluation.metrics import Metric, Reference
from ddpm_dist.evaluation.moments import KEPT, Summary
from ddpm_dist.evaluation.order import BITS_PER_DIM, Order, network_specs
from ddpm_dist.evaluation.worker import LikelihoodTask, NearestTask, SetPart, SummaryTask
from ddpm_dist.progress import Progress, counted
from ddpm_dist.sampling import Manifest, grid_png

EVERYTHING = 2**62
PART_IMAGES = 128


@dataclass(frozen=True)
class Comparison:
    """One pool, the networks that are asked for which metrics, and the size at which sets are compared."""

    pool: ActorPool
    most_workers: int
    wanted: Sequence[Metric]
    given: Reference | None
    """The statistics that order.reference names."""
    is_named: bool
    """Whether they say of which network they are."""
    specs: Mapping[str, str]
    networks: Mapping[str, FeatureNetwork]
    keep: int
    size: int
    channels: int

    @property
    def shape(self) -> tuple[int, int]:
        """(size, channels)."""
        return self.size, self.channels

    def parts(self, url: str, count: int, at: str | None = None) -> list[SetPart]:
        """Parts of a set, enough for all workers and small enough to be done again. at: as in `load_index`."""
        number = max(1, min(-(-count // PART_IMAGES), 4 * self.most_workers))
        return [SetPart(url, (k, number), self.size, self.channels, at) for k in range(number)]

    def references(self, data: DataIndex | None, count: int) -> dict[str, Reference]:
        """The given one; else stored ones where they are, and what is missing computed and stored.

        count: of samples, whose floor is wanted.
        """
        if self.given is not None:
            return dict.fromkeys(self.networks, self.given)
        assert data is not None
        urls = {
            name: statistics.statistics_url(data.home, data.content_id, self.size, self.channels, network, KEPT)
            for name, network in self.networks.items()
        }
        stored = {name: statistics.load(url) for name, url in urls.items()}
        found = {name: summary for name, summary in stored.items() if summary is not None}
        missing = [name for name in self.networks if name not in found]
        if missing:
            made = self.summaries(data.url, data.num_samples, halves=True, only=missing, at=data.at)
            for name, summary in made.items():
                statistics.save(urls[name], summary, self.networks[name], self.shape, data.content_id)
                found[name] = summary
        for name, summary in found.items():
            if min(part.count for part in summary.parts) > 1:
                summary.floor, summary.floor_counts = statistics.floor_of(urls[name], summary, count)
        return dict(found)

    def summaries(
        self,
        url: str,
        count: int,
        *,
        halves: bool,
        limit: int = EVERYTHING,
        only: Sequence[str] | None = None,
        at: str | None = None,
    ) -> dict[str, Summary]:
        """{network: summary} of a set, merged as its parts come in. at: as in `load_index`."""
        names = list(self.networks if only is None else only)
        specs = {self.specs[name]: name for name in names}
        keep = KEPT if halves else self.keep
        tasks = [SummaryTask(part, tuple(specs), halves, keep, limit) for part in self.parts(url, count, at)]
        whole: dict[str, Summary] = {}
        with Progress(f"features of {storage.redact(url)}", "image", min(count, limit)) as progress:
            for outcome in self.pool.map(tasks):
                if isinstance(outcome, Failed):
                    raise _given_up(outcome)
                done = 0
                for spec, summary in outcome.value.items():
                    done = summary.count
                    if specs[spec] in whole:
                        whole[specs[spec]].merge(summary)
                    else:
                        whole[specs[spec]] = summary
                progress.add(done, counted(self.pool.alive, "worker"))
        for name, summary in whole.items():
            if summary.count != min(count, limit):
                raise EvaluationError(f"{url}: {summary.count} images came for {min(count, limit)} in {name}")
        return whole


def prepare(order: Order, pool: ActorPool, most_workers: int, shape: tuple[int, int]) -> Comparison:
    """Opens networks and statistics, for images of (size, channels).

    Raises EvaluationError for what doesn't fit together: before hours are spent on images.
    """
    size, channels = shape
    wanted = metrics.parse(name for name in order.metrics if name != BITS_PER_DIM)
    specs = network_specs(wanted, order.networks)
    networks = open_networks(order, shape)
    given, is_named = None, True
    if order.reference is not None:
        compared = {m.network: networks[m.network] for m in wanted if m.kind != "is"}
        given, is_named = load_given(order.reference, shape, compared)
    for metric in wanted:
        metrics.check(metric, networks[metric.network], given)
    keep = KEPT if any(metric.kind in metrics.NEEDS_KEPT for metric in wanted) else 0
    return Comparison(pool, most_workers, wanted, given, is_named, specs, networks, keep, size, channels)


def open_networks(order: Order, shape: tuple[int, int]) -> dict[str, FeatureNetwork]:
    """The feature networks that an order's metrics use, by name, for images of (size, channels)."""
    size, channels = shape
    wanted = metrics.parse(name for name in order.metrics if name != BITS_PER_DIM)
    specs = network_specs(wanted, order.networks)
    return {name: open_network(spec, (channels, size, size)) for name, spec in specs.items()}


def mean_bits_per_dim(order: Order, manifest: Manifest | None, compare: Comparison) -> dict[str, float]:
    index, from_snapshot = order.likelihood_set(), order.snapshot or (manifest.snapshot if manifest else None)
    assert index is not None
    if from_snapshot is None:
        raise EvaluationError(f"{BITS_PER_DIM}: needs a snapshot, and the samples have no manifest that names theirs")
    total, parts = index.num_samples, compare.parts(index.url, index.num_samples, index.at)
    tasks = [LikelihoodTask(part, from_snapshot, order.seed, EVERYTHING) for part in parts]
    sums = np.zeros(4)
    with Progress("bits/dim", "image", total) as progress:
        for outcome in compare.pool.map(tasks):
            if isinstance(outcome, Failed):
                raise _given_up(outcome)
            sums += outcome.value
            progress.add(outcome.value[0], counted(compare.pool.alive, "worker"))
    found = dict(
        zip((BITS_PER_DIM, f"{BITS_PER_DIM}_prior", f"{BITS_PER_DIM}_decoder"), sums[1:] / sums[0], strict=True)
    )
    return {name: float(value) for name, value in found.items() if not np.isnan(value)}  # the ODE's has no parts


def nearest(order: Order, compare: Comparison, samples: str, data: DataIndex, name: str) -> dict[str, Any]:
    """First samples, each above its nearest image of the data set, as a picture; and their distances."""
    spec = "lite0" if "lite0" in compare.networks else next(iter(compare.specs.values()), "lite0")
    shape = (compare.channels, compare.size, compare.size)
    network = open_network(spec, shape)
    first = itertools.islice(iterate(samples, (0, 1), compare.size, compare.channels), order.nearest)
    images = torch.from_numpy(np.stack([sample.image for sample in first]))
    queries = network(images).features
    tasks = [NearestTask(part, spec, queries.numpy()) for part in compare.parts(data.url, data.num_samples, data.at)]
    distances, rows = torch.full((len(images),), math.inf, dtype=torch.float64), torch.zeros(len(images)).long()
    pictures = torch.zeros_like(images)
    for outcome in compare.pool.map(tasks):
        if isinstance(outcome, Failed):
            raise _given_up(outcome)
        distance, row, picture = outcome.value
        closer = distance < distances
        distances[closer], rows[closer], pictures[closer] = distance[closer], row[closer], picture[closer]
    found: dict[str, Any] = {"network": network.name, "distances": distances.tolist(), "indices": rows.tolist()}
    if order.out:
        found["picture"] = storage.join(order.out, "nearest", f"{name}.png")
        storage.publish(found["picture"], grid_png(torch.cat([images, pictures]), columns=len(images)))
    return found


def _given_up(outcome: Failed[Any]) -> DdpmDistError:
    """A store that doesn't answer is no fault of what was asked."""
    kind = UnreachableError if isinstance(outcome.error, UnreachableError) else EvaluationError
    return kind(f"{outcome.task}: {outcome.error}")
