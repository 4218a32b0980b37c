"""What makes an evaluation's numbers incomparable with others, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from ddpm_dist.data import DataIndex
from ddpm_dist.evaluation.compare import Comparison
from ddpm_dist.evaluation.metrics import Reference
from ddpm_dist.evaluation.moments import Summary
from ddpm_dist.evaluation.order import BITS_PER_DIM, Order
from ddpm_dist.evaluation.result import ENOUGH
from ddpm_dist.sampling import Manifest

LOSSY = ("jpeg", "webp")


def warnings(
    order: Order, result: Mapping[str, Any], manifest: Manifest | None, data: DataIndex | None, compare: Comparison
) -> list[str]:
    """All that should be known before a result's numbers are laid beside others."""
    found = [*_of_samples(result, manifest), *_of_networks(result["num_samples"], data, compare)]
    if data is not None:
        lossy = {name: number for name, number in data.schema.formats.items() if name in LOSSY}
        if lossy:
            found.append(f"the reference is lossy ({lossy}): its artefacts count as differences")
        found += _resized("the reference", data, compare.size)
    else:
        found.append("no floor: the reference is a statistics file without images")
        if not compare.is_named:
            names = ", ".join(network.name for network in compare.networks.values())
            found.append(
                f"the reference's statistics don't say of which network they are: they are taken for {names}'s"
            )
    held_out = order.likelihood_set() if BITS_PER_DIM in order.metrics and order.held_out is not None else None
    if held_out is not None:
        found += _resized("--held-out", held_out, compare.size)
    return found


def floors_of(references: Mapping[str, Reference]) -> dict[str, str]:
    """{network: between how many real images its floor is}."""
    return {
        name: f"between {reference.floor_counts[0]} and {reference.floor_counts[1]} real images"
        for name, reference in references.items()
        if isinstance(reference, Summary) and reference.floor_counts is not None
    }


def _of_samples(result: Mapping[str, Any], manifest: Manifest | None) -> Iterator[str]:
    count, duplicates = result["num_samples"], result["duplicates"]
    if count < ENOUGH:
        yield f"{count} samples are few: a Fréchet distance grows with fewer; papers use 50,000, at least {ENOUGH}"
    if manifest is None:
        yield "the samples have no manifest: weights, sampler and duplicates are unknown"
    elif manifest.kind != "ema":
        yield _of_weights(manifest.kind)
    if duplicates:
        yield f"{duplicates} of {count} samples equal an earlier one, pixel by pixel: they count as one in truth"


def _of_weights(kind: str | None) -> str:
    """What weights that aren't the run's EMA mean for a distance."""
    if kind is None:
        return "it isn't known whether the weights are an average: those of raw ones are much larger"
    if kind.startswith("power-"):
        return f"the weights are another average, {kind}, not the run's EMA: compare those of one width"
    return f"the weights are {kind}, not EMA: distances are much larger"


def _of_networks(count: int, data: DataIndex | None, compare: Comparison) -> Iterator[str]:
    for network in compare.networks.values():
        sizes = [count] if data is None else [count, data.num_samples // 2]
        if min(sizes) <= network.dim:
            yield (
                f"{network.name}: {min(sizes)} images (of samples or of a half of the reference) in {network.dim} "
                "dimensions: the covariance is singular and the distance has a high floor"
            )
        if network.smooths_above is not None and compare.size > network.smooths_above:
            yield (
                f"{network.name}: images of {compare.size} px are resized with an antialiasing filter; FID's graph, "
                "ADM's and NVIDIA's tools and pytorch-fid resize without one. For numbers beside theirs: --network "
                "inception=URL#resize=tensorflow"
            )


def _resized(what: str, data: DataIndex, size: int) -> Iterator[str]:
    sides = {*data.schema.min_size, *data.schema.max_size} - {size}
    if sides:
        low, high = min(sides), max(sides)
        yield f"{what}'s images of {low} to {high} px were resized and cropped to {size} px, as training does"
