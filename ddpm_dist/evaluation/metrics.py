"""Metrics by name: `<kind>_<network>`, each a function of the summaries of samples and reference.

    frechet   Fréchet distance; in Inception features this is FID, and only then is it called so
    kid       Kernel Inception Distance
    is        Inception Score, of networks with classes
    prdc      precision, recall, density, coverage
    sfid      Fréchet distance of spatial features, of Inception

Beside each stands its floor: the same metric between disjoint parts of the reference, at the number of samples of the
value where the reference has twice as many.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import distances
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.given import Given
from ddpm_dist.evaluation.moments import KEPT, Summary

MIN_HALF = 50
ALIASES = {
    "fid": "frechet_inception",
    "kid": "kid_inception",
    "is": "is_inception",
    "prdc": "prdc_inception",
    "sfid": "sfid_inception",
}
NEEDS_KEPT = ("kid", "prdc")
SETTINGS: Mapping[str, Mapping[str, int]] = {
    "kid": {"subsets": distances.KID_SUBSETS, "subset_size": distances.KID_SUBSET, "kept": KEPT},
    "prdc": {"k": distances.PR_K, "k_density": distances.DC_K, "kept": KEPT},
}
"""What a metric's values depend on beside images and network; it stands in the result."""
LARGER_IS_BETTER = ("is_", "precision_", "recall_", "density_", "coverage_")
"""How the names of values begin of which the larger is the better one."""


@dataclass(frozen=True)
class Metric:
    """A metric that was asked for."""

    kind: str
    network: str
    """Name of its network, as in `--network NAME=URL`."""

    def __str__(self) -> str:
        return f"{self.kind}_{self.network}"


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


def check(metric: Metric, network: FeatureNetwork, given: Reference | None) -> None:
    """EvaluationError if the network, or statistics that the user gave, lack what a metric needs."""
    name = f"{metric.kind}_{network.name}"
    if metric.kind == "is" and not network.classes:
        raise EvaluationError(f"{name}: {network.name} has no classes; use inception")
    if metric.kind == "sfid" and not network.spatial_dim:
        raise EvaluationError(f"{name}: {network.name} has no spatial features; use inception")
    if given is None or metric.kind == "is":
        return
    dim = len(given.mean if isinstance(given, Given) else given.moments.total)
    if dim != network.dim:
        raise EvaluationError(
            f"--reference: its mean has {dim} features, {network.name} has {network.dim}; it was made with another "
            "network"
        )
    images_kept = isinstance(given, Summary) and len(given.kept.features)
    if metric.kind in NEEDS_KEPT and not images_kept:
        raise EvaluationError(f"{name}: needs the reference's images, not only their mean; give --data")
    if metric.kind == "sfid" and given.spatial is None:
        raise EvaluationError(f"{name}: the reference has no spatial features; give --data")


def compute(metric: Metric, network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    """{name: value} of one metric that passed `check`, each with `<name>_floor` where the reference allows it."""
    return KINDS[metric.kind](network, samples, reference)


def _frechet(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    name = "fid" if network.name == "inception" else f"frechet_{network.name}"
    if isinstance(reference, Given):
        return {name: distances.frechet(samples.moments, reference)}
    values = {name: distances.frechet(samples.moments, reference.moments)}
    return values if reference.floor is None else {**values, f"{name}_floor": reference.floor}


def _sfid(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    assert samples.spatial is not None
    assert reference.spatial is not None
    return {"sfid": distances.frechet(samples.spatial, reference.spatial)}


def _kid(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    assert isinstance(reference, Summary)
    real = reference.kept.features
    value, deviation = distances.kid(samples.kept.features, real)
    half = len(real) // 2
    values = {f"kid_{network.name}": value, f"kid_{network.name}_deviation": deviation}
    if half >= MIN_HALF:
        floor = distances.kid(real[:half], real[half:])[0]
        values[f"kid_{network.name}_floor"] = floor
    return values


def _inception_score(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    assert samples.score is not None
    value, deviation = distances.inception_score(samples.score)
    values = {f"is_{network.name}": value, f"is_{network.name}_deviation": deviation}
    if isinstance(reference, Summary) and reference.score is not None:
        values[f"is_{network.name}_real"] = distances.inception_score(reference.score)[0]
    return values


def _prdc(network: FeatureNetwork, samples: Summary, reference: Reference) -> Values:
    assert isinstance(reference, Summary)
    real = reference.kept.features
    found = distances.prdc(real, samples.kept.features)
    values = {f"{name}_{network.name}": value for name, value in found.items()}
    apart = min(len(samples.kept.features), len(real) // 2)  # they depend on the number of samples
    if apart >= MIN_HALF:
        floors = distances.prdc(real[apart:], real[:apart])
        values |= {f"{name}_{network.name}_floor": value for name, value in floors.items()}
    return values


KINDS: Mapping[str, Callable[[FeatureNetwork, Summary, Reference], Values]] = {
    "frechet": _frechet,
    "kid": _kid,
    "is": _inception_score,
    "prdc": _prdc,
    "sfid": _sfid,
}
