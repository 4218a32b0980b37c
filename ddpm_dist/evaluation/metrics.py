"""Metrics by name: `<kind>_<network>`, each a function of the summaries of samples and reference.

    frechet   Fréchet distance; in Inception features this is FID, and only then is it called so
    kid       Kernel Inception Distance
    is        Inception Score, of networks with classes
    prdc      precision, recall, density, coverage
    sfid      Fréchet distance of spatial features, of Inception

Beside each stands its floor: the same metric between two disjoint halves of the reference.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import distances
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.moments import Summary

KEPT = 10_000
"""Features kept of each set for the metrics that compare single images."""
MIN_HALF = 50
ALIASES = {
    "fid": "frechet_inception",
    "kid": "kid_inception",
    "is": "is_inception",
    "prdc": "prdc_inception",
    "sfid": "sfid_inception",
}
NEEDS_KEPT = ("kid", "prdc")


@dataclass(frozen=True)
class Metric:
    """A metric that was asked for."""

    kind: str
    network: str
    """Name of its network, as in `--network NAME=URL`."""


@dataclass(frozen=True)
class Given:
    """Mean and covariance from somebody's statistics file, whose images are not there."""

    mean: Tensor
    covariance: Tensor
    count: int = 2**31
    """Unknown in those files; large, since they describe whole data sets."""


Reference = Summary | Given
Values = dict[str, float]


def parse(names: Iterable[str]) -> list[Metric]:
    """Metrics of names such as frechet_lite0, fid, prdc_inception; EvaluationError lists what there is."""
    metrics = []
    for name in names:
        kind, _, network = ALIASES.get(name, name).partition("_")
        if kind not in KINDS or not network:
            raise EvaluationError(
                f"evaluation.metrics: {name!r} is unknown; a metric is <kind>_<network> with a kind of "
                f"{', '.join(KINDS)} and a network such as pixel, lite0, inception, or one of {', '.join(ALIASES)}; "
                "beside them there is bits_per_dim"
            )
        metrics.append(Metric(kind, network))
    return metrics


def compute(metric: Metric, network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    """{name: value} of one metric, each with `<name>_floor` where the reference allows it."""
    return KINDS[metric.kind](network, samples, reference)


def _frechet(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    name = "fid" if network.name == "inception" else f"frechet_{network.name}"
    if isinstance(reference, Given):
        return {name: distances.frechet(samples.moments, _fitting(reference, network))}
    values = {name: distances.frechet(samples.moments, reference.moments)}
    return values if reference.floor is None else {**values, f"{name}_floor": reference.floor}


def _sfid(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    if isinstance(reference, Given) or samples.spatial is None or reference.spatial is None:
        raise EvaluationError(f"sfid_{network.name}: {network.name} or the reference has no spatial features")
    return {"sfid": distances.frechet(samples.spatial, reference.spatial)}


def _kid(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    real = _images_of(reference, "kid", network)
    value, deviation = distances.kid(samples.kept.features, real.kept.features)
    half = len(real.kept.features) // 2
    values = {f"kid_{network.name}": value, f"kid_{network.name}_deviation": deviation}
    if half >= MIN_HALF:
        floor = distances.kid(real.kept.features[:half], real.kept.features[half:])[0]
        values[f"kid_{network.name}_floor"] = floor
    return values


def _inception_score(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    if samples.score is None:
        raise EvaluationError(f"is_{network.name}: {network.name} has no classes; use inception")
    value, deviation = distances.inception_score(samples.score)
    values = {f"is_{network.name}": value, f"is_{network.name}_deviation": deviation}
    if isinstance(reference, Summary) and reference.score is not None:
        values[f"is_{network.name}_real"] = distances.inception_score(reference.score)[0]
    return values


def _prdc(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    real = _images_of(reference, "prdc", network).kept.features
    found = distances.prdc(real, samples.kept.features)
    values = {f"{name}_{network.name}": value for name, value in found.items()}
    half = len(real) // 2
    if half >= MIN_HALF:
        floors = distances.prdc(real[:half], real[half:])
        values |= {f"{name}_{network.name}_floor": value for name, value in floors.items()}
    return values


def _images_of(reference: Reference, kind: str, network: FeatureNetwork) -> Summary:
    if isinstance(reference, Given):
        raise EvaluationError(f"{kind}_{network.name}: needs the reference's images, not only their mean; give --data")
    return reference


def _fitting(reference: Given, network: FeatureNetwork) -> Given:
    if len(reference.mean) != network.dim:
        raise EvaluationError(
            f"--reference: its mean has {len(reference.mean)} features, {network.name} has {network.dim}; "
            "it was made with another network"
        )
    return reference


KINDS: Mapping[str, Callable[[FeatureNetwork, Summary, Reference], Values]] = {
    "frechet": _frechet,
    "kid": _kid,
    "is": _inception_score,
    "prdc": _prdc,
    "sfid": _sfid,
}
