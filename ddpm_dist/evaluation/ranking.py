"""Which results may be ranked among each other, and the best of a run: only answers to the same question compete.

A result of version 0.1.0 doesn't say all that its numbers depend on: it is shown, and never ranked.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_dist import snapshot, storage
from ddpm_dist.errors import NotFoundError, SnapshotError
from ddpm_dist.evaluation.metrics import LARGER_IS_BETTER
from ddpm_dist.evaluation.question import Question
from ddpm_dist.evaluation.result import results
from ddpm_dist.training.run_folder import snapshot_url

log = logging.getLogger(__name__)

BEST = "best.json"
Result = Mapping[str, Any]


def answer_to(result: Result, name: str) -> str | None:
    """Of which question a value is the answer; None if the result doesn't say, or the value is no number."""
    value, answers = result["metrics"].get(name), result.get("answers")
    if value is None or not math.isfinite(value) or not isinstance(answers, Mapping):
        return None
    found = answers.get(name)
    return found if isinstance(found, str) else None


def groups(found: Sequence[Result], name: str) -> list[list[Result]]:
    """Results whose values of a name may be compared, in the order of their steps, one for each step.

    They answer the same question about snapshots of one folder. Of two at one step, the later evaluated one counts:
    the snapshot was made anew in between.
    """
    by_question: dict[tuple[str, str], dict[Any, Result]] = {}
    for result in found:
        answer, lineage = answer_to(result, name), str(result.get("snapshot")).rpartition("/")[0]
        if answer is None:
            continue
        of_steps = by_question.setdefault((answer, lineage), {})
        step = result["step"] if result["step"] is not None else result["name"]
        if step not in of_steps or _finished(of_steps[step]) <= _finished(result):
            of_steps[step] = result
    return [sorted(g.values(), key=lambda r: (r["step"] is None, r["step"] or 0)) for g in by_question.values()]


def best_of(group: Sequence[Result], name: str) -> Result:
    """The result with the best value, the earliest of equals."""
    return by_value(group, name)[0]


def by_value(group: Sequence[Result], name: str) -> list[Result]:
    """Results, the best value first, the earliest of equals."""
    sign = -1 if name.startswith(LARGER_IS_BETTER) else 1
    return sorted(group, key=lambda result: (sign * result["metrics"][name], result["step"] or 0))


def mark_best(run_url: str, question: Question) -> dict[str, Any] | None:
    """Writes best.json: the run's best snapshot by a question's first metric; `others` has those of other questions.

    Snapshots that are no longer there, or were made anew since, don't count.
    """
    folder = storage.join(run_url, "evaluation")
    found = results(folder)
    by_id: dict[str, dict[str, Any]] = {}
    for result in found:
        asked = result.get("question")
        if isinstance(asked, Mapping) and asked.get("id") not in by_id and result["metrics"]:
            mine = asked.get("id") == question.id
            name = _first_value(result, question) if mine else next(iter(result["metrics"]))
            entry = _best_there(run_url, found, result, name)
            if entry is not None:
                by_id[asked["id"]] = {**entry, "question": asked["id"], "num_samples": result["num_samples"]}
    best = by_id.pop(question.id, None)
    if best is not None:
        best["others"] = list(by_id.values())
        storage.publish(storage.join(folder, BEST), (json.dumps(best, indent=2) + "\n").encode())
    return best


def _first_value(result: Result, question: Question) -> str:
    wanted = question.of_metric(question.metrics[0])
    return next(name for name in result["metrics"] if answer_to(result, name) == wanted)


def _best_there(run_url: str, found: Sequence[Result], like: Result, name: str) -> dict[str, Any] | None:
    """The best of a run's snapshots among the results that answer what one of them answers in a value."""
    answer = answer_to(like, name)
    rated = [r for r in found if answer is not None and answer_to(r, name) == answer and r["step"] is not None]
    for result in by_value(rated, name):
        url = snapshot_url(run_url, result["step"])
        if snapshot_id_at(url) == result.get("snapshot_id"):
            return {"snapshot": url, "step": result["step"], "metric": name, "value": result["metrics"][name]}
    return None


def snapshot_id_at(url: str) -> str | None:
    """What a snapshot is, by content; None if there is none, or one that can't be read."""
    try:
        return snapshot.snapshot_id(url)
    except (SnapshotError, NotFoundError):
        return None


def _finished(result: Result) -> str:
    return str(result.get("finished_at", ""))
