"""The result of an evaluation: a JSON object that says what was compared with what, and how far to trust it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

import ddpm_dist
from ddpm_dist import storage
from ddpm_dist.data import DataIndex
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.order import Order
from ddpm_dist.sampling import Manifest

LOSSY = ("jpeg", "webp")
ENOUGH = 10_000
"""Samples below which published numbers of Fréchet distances are not comparable (their bias is large)."""


def describe(
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
        "name": _name(manifest, count, data, order, [network.hash for network in networks.values()]),
        "asked": {"metrics": list(order.metrics), "num_samples": order.num_samples},
        "samples": samples if order.samples else None,
        "num_samples": count,
        "snapshot": manifest.snapshot if manifest else None,
        "snapshot_id": manifest.snapshot_id if manifest else None,
        "step": manifest.step if manifest else None,
        "images_seen": manifest.images_seen if manifest else None,
        "weights": manifest.kind if manifest else None,
        "seed": manifest.seed if manifest else None,
        "sampling": manifest.sampling.model_dump(mode="json") if manifest else None,
        "sampled_on": manifest.fingerprint.model_dump(mode="json") if manifest else None,
        "reference": reference,
        "networks": {n.name: {"hash": n.hash, "features": n.dim, "resize": n.resize} for n in networks.values()},
        "versions": {
            "ddpm_dist": ddpm_dist.__version__,
            "torch": str(torch.__version__),
            "ray": version("ray"),
        },
    }


def _name(manifest: Manifest | None, count: int, data: DataIndex | None, order: Order, hashes: Sequence[str]) -> str:
    """Says the step, the numbers of images and the reference; one name for one question."""
    step = f"{manifest.step:09d}" if manifest and manifest.step is not None else "samples"
    if data is not None:
        place, against = data.url, f"{data.num_samples}-of-{data.content_id[:8]}"
    else:
        place = order.reference or ""
        against = place.rpartition("/")[2].removesuffix(".npz")
    question = [manifest.model_dump_json() if manifest else order.samples, place, order.metrics, order.held_out, hashes]
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:8]
    return f"{step}-{count}-against-{against}-{digest}"


def warnings(
    manifest: Manifest | None,
    count: int,
    data: DataIndex | None,
    networks: Mapping[str, FeatureNetwork],
    size: int,
) -> list[str]:
    """What makes these numbers incomparable with others."""
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
