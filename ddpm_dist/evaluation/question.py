"""The question that an evaluation answers, decided by content: only answers to the same one may be compared.

It is the metric, the number of samples, what the reference holds, how the samples were drawn (sampler, seed, labels)
and the feature network's weights. Names of results, whether a snapshot has its answer, ranking, curves, best.json and
the training states kept for it all go by it; no name, count or shape decides beside it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_dist import storage
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation import metrics
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.order import BITS_PER_DIM, Order
from ddpm_dist.sampling import Labels, Manifest
from ddpm_dist.snapshot import snapshot_id

_LAYOUT = {"batch_size", "unit_size", "format"}
"""Settings of sampling that decide how images are computed and stored, not which."""


@dataclass(frozen=True)
class Question:
    """What is asked of a snapshot, or of a set of samples."""

    metrics: tuple[str, ...]
    """`<kind>_<network>` or bits_per_dim, in the order in which they are wanted."""
    count: int
    """Samples."""
    shape: tuple[int, int]
    """(size, channels) at which the sets are compared."""
    reference: str
    """What the samples are compared with, by content."""
    held_out: str | None
    """What bits_per_dim is the mean over, by content."""
    seed: int
    """Of bits_per_dim's draws."""
    networks: Mapping[str, str]
    """{name: hash of weights and preprocessing}."""
    drawn: Mapping[str, Any] | None
    """Sampler's settings, seed and labels; None: of samples that don't say."""

    @property
    def id(self) -> str:
        """12 hex digits; the order of the metrics makes no difference."""
        return _digest(sorted({self.of_metric(metric) for metric in self.metrics}))

    def of_metric(self, metric: str) -> str:
        """12 hex digits of the part of the question that one metric's values depend on."""
        if metric == BITS_PER_DIM:
            return _digest([metric, self.held_out, self.seed, self.shape])
        parsed = metrics.parse([metric])[0]
        how = [metrics.SETTINGS.get(parsed.kind), self.networks[parsed.network]]
        return _digest([parsed.kind, how, self.count, self.shape, self.reference, self.drawn])

    def subject(self, content: str) -> str:
        """16 hex digits of this question about something, such as a snapshot's id."""
        return _digest([self.id, content], 16)

    def dump(self) -> dict[str, Any]:
        """For the result."""
        return {"id": self.id, **asdict(self)}


def ask(
    order: Order,
    count: int,
    shape: tuple[int, int],
    drawn: Mapping[str, Any] | None,
    networks: Mapping[str, FeatureNetwork],
) -> Question:
    """The question of an order. networks: by the names that its metrics use."""
    wanted = metrics.parse(name for name in order.metrics if name != BITS_PER_DIM)
    names = iter(wanted)
    canonical = [name if name == BITS_PER_DIM else str(next(names)) for name in order.metrics]
    held_out = order.likelihood_set() if BITS_PER_DIM in order.metrics else None
    return Question(
        metrics=tuple(dict.fromkeys(canonical)),
        count=count,
        shape=shape,
        reference=_reference(order),
        held_out=held_out.content_id if held_out else None,
        seed=order.seed,
        networks={name: network.hash for name, network in networks.items()},
        drawn=drawn,
    )


def drawn_by(manifest: Manifest | None) -> dict[str, Any] | None:
    """How a sampling job drew its samples."""
    return None if manifest is None else _drawn(manifest.sampling, manifest.seed, manifest.labels, manifest.guide_id)


def drawn_for(order: Order, num_classes: int | None, has_null: bool) -> dict[str, Any]:
    """How an order's samples will be drawn, from a network of so many classes."""
    labels, guide = Labels.parse(order.labels, num_classes, has_null).spec, order.sampling.guide
    return _drawn(order.sampling, order.seed, labels, guide and snapshot_id(guide))


def answered(result: Mapping[str, Any], question: Question) -> bool:
    """Whether a result answers exactly this question; one of version 0.1.0 doesn't say what it answers."""
    said = result.get("question")
    return isinstance(said, Mapping) and said.get("id") == question.id


def _drawn(sampling: Any, seed: int, labels: str, guide: str | None) -> dict[str, Any]:
    """guide: what sampling.guide is, by content."""
    settings = sampling.model_dump(mode="json", exclude=_LAYOUT, exclude_defaults=True)
    settings |= {"guide": guide} if guide else {}
    return {"sampling": {"sampler": sampling.sampler, **settings}, "seed": seed, "labels": labels}


def _reference(order: Order) -> str:
    if data := order.data_set():
        return f"data {data.content_id}"
    assert order.reference is not None
    try:
        return f"file {hashlib.sha256(storage.read(order.reference)).hexdigest()}"
    except NotFoundError:
        raise EvaluationError(f"--reference {storage.redact(order.reference)}: not found") from None


def _digest(value: Sequence[Any], digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
