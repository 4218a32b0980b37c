"""The result of an evaluation: a JSON object that says what was compared with what, and how far to trust it."""

import json
import logging
import math
from collections.abc import Mapping
from importlib.metadata import version
from types import NoneType
from typing import Any

import torch

import ddpm_dist
from ddpm_dist import storage
from ddpm_dist.data import DataIndex
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.order import Order
from ddpm_dist.evaluation.question import Question
from ddpm_dist.sampling import Manifest

log = logging.getLogger(__name__)

UNKEPT = "unkept"
ENOUGH = 10_000
"""Samples below which published numbers of Fréchet distances are not comparable (their bias is large)."""


def describe(
    order: Order,
    samples: str,
    manifest: Manifest | None,
    count: int,
    data: DataIndex | None,
    networks: Mapping[str, FeatureNetwork],
    question: Question,
    subject: str,
) -> dict[str, Any]:
    """What was compared with what. subject: what the samples are of, by content."""
    reference: dict[str, Any] = {"statistics": order.reference}
    if data is not None:
        place = {"data": data.url} if data.at is None else {"data": data.url, "index": data.at}
        reference = {**place, "content_id": data.content_id, "num_samples": data.num_samples, "flips": False}
    return {
        "name": name_of(question, subject, manifest.step if manifest else None, _against(order, data)),
        "question": question.dump(),
        "asked": {"metrics": list(order.metrics), "num_samples": order.num_samples},
        "samples": samples if order.samples else None,
        "num_samples": count,
        "snapshot": manifest.snapshot if manifest else None,
        "snapshot_id": manifest.snapshot_id if manifest else None,
        "step": manifest.step if manifest else None,
        "images_seen": manifest.images_seen if manifest else None,
        "weights": manifest.kind if manifest else None,
        "seed": manifest.seed if manifest else None,
        "labels": manifest.labels if manifest else None,
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


def name_of(question: Question, subject: str, step: int | None, against: str) -> str:
    """Says the step, the numbers of images and the reference; one name for one question about one content.

    Its end is the question's id and that of the question about this content, 8 digits of each.
    """
    what = "samples" if step is None else f"{step:09d}"
    return f"{what}-{question.count}-against-{against}-{question.id[:8]}-{question.subject(subject)[:8]}"


def _against(order: Order, data: DataIndex | None) -> str:
    if data is not None:
        return f"{data.num_samples}-of-{data.content_id[:8]}"
    return (order.reference or "").rpartition("/")[2].removesuffix(".npz")


def answer_url(folder: str, question: Question, subject: str) -> str | None:
    """Where an evaluation folder has the answer to a question about something; None if it hasn't."""
    end = f"-{question.subject(subject)[:8]}.json"
    names = [name for name in storage.list_names(storage.join(folder, "results")) if name.endswith(end)]
    return storage.join(folder, "results", names[0]) if names else None


def unkept(folder: str, question: Question, subject: str) -> str:
    """Where a snapshot's images lie until they are evaluated: the question's own, so that a killed job goes on."""
    return storage.join(folder, UNKEPT, question.subject(subject))


def remove_answered(folder: str) -> None:
    """Removes images whose question has its answer: of evaluations that were killed between the two."""
    ends = {name.removesuffix(".json")[-8:] for name in storage.list_names(storage.join(folder, "results"))}
    for name in storage.list_names(storage.join(folder, UNKEPT)):
        if name[:8] in ends:
            storage.discard(storage.join(folder, UNKEPT, name))


def check_finite(values: Mapping[str, float]) -> None:
    """EvaluationError for a value that is no number: ranking and curves would hide it."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise EvaluationError(f"{wrong[0]}: {values[wrong[0]]} came out; did the run diverge?")


def publish(folder: str, result: Mapping[str, Any]) -> str:
    """Writes `results/<name>.json` and the collection `results.jsonl` of an evaluation folder; returns the URL."""
    url = storage.join(folder, "results", f"{result['name']}.json")
    storage.publish(url, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    lines = [json.dumps(found) for found in results(folder)]
    storage.publish(storage.join(folder, "results.jsonl"), ("\n".join(lines) + "\n").encode())
    return url


def results(folder: str) -> list[dict[str, Any]]:
    """All results of an evaluation folder, by name: that is, by step. A damaged one is said and left out."""
    found = []
    for name in storage.list_names(storage.join(folder, "results")):
        url = storage.join(folder, "results", name)
        try:
            found.append(read_result(url))
        except EvaluationError as error:
            log.warning("%s; it is left out", error)
        except NotFoundError:
            pass  # taken away since the listing
    return found


def read_result(url: str) -> dict[str, Any]:
    """One result; EvaluationError if it is damaged. Those of version 0.1.0 have no question."""
    try:
        found = json.loads(storage.read(url))
        wrong = [key for key, kind in _KINDS.items() if not isinstance(found.get(key), kind)]
        wrong += [f"metrics.{key}" for key, value in found["metrics"].items() if not _is_number(value)]
    except (ValueError, AttributeError, KeyError):
        raise EvaluationError(f"{storage.redact(url)}: damaged, it is not a result of an evaluation") from None
    if wrong:
        raise EvaluationError(f"{storage.redact(url)}: damaged, its {wrong[0]} is not what a result has there")
    return dict(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS: Mapping[str, Any] = {
    "name": str,
    "step": (int, NoneType),
    "num_samples": int,
    "metrics": dict,
    "reference": dict,
    "networks": dict,
    "warnings": list,
    "versions": dict,
}
"""What those who read a result rely on."""
