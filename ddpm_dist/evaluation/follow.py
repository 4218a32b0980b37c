"""Follows a run: evaluates each new snapshot once, draws the curves, marks the best.

    evaluation/results/<name>.json   one per snapshot; a step that has one is not evaluated again
    evaluation/results.jsonl         all of them
    evaluation/best.json             the snapshot with the best value of the first metric
    evaluation/grids/<name>.png      its first samples
    tensorboard/evaluation/          the curves

It holds no resources between two snapshots, and the training never waits for it. Killed and started again,
it goes on with the snapshots that have no result; a sampling job that was broken off keeps its units.
"""

import json
import logging
import shlex
import time
from collections.abc import Mapping
from typing import Any

from ddpm_dist import storage
from ddpm_dist.cluster import submit_beside
from ddpm_dist.config import Config
from ddpm_dist.errors import ClusterError, EvaluationError
from ddpm_dist.evaluation import job
from ddpm_dist.evaluation.metrics import LARGER_IS_BETTER
from ddpm_dist.evaluation.order import Order, check_metrics
from ddpm_dist.evaluation.report import write_report
from ddpm_dist.evaluation.result import results
from ddpm_dist.training import EVENTS, EventLog
from ddpm_dist.training.run_folder import snapshot_url

log = logging.getLogger(__name__)

POLL_S = 10.0


def follow(cfg: Config, order: Order, workers: tuple[int, int], poll_s: float = POLL_S) -> int:
    """Evaluates snapshots until that of the last step (train.steps) has a result; returns how many it did.

    order: what to compare with and how; its snapshot and folder are set for each snapshot.
    """
    folder = storage.join(cfg.run.url, "evaluation")
    show(cfg, folder, order)  # an earlier follower may have been killed between a result and its curves
    done = 0
    while True:
        pending = pending_steps(cfg, folder, order)
        for step in pending:
            if _evaluate_one(cfg, order, folder, step, workers):
                done += 1
        last = snapshot_url(cfg.run.url, cfg.train.steps)
        if not pending and storage.exists(storage.join(last, "model_index.json")):
            return done
        time.sleep(poll_s)


def check_config(cfg: Config) -> None:
    """EvaluationError if evaluation.every asks for a follower that could not evaluate."""
    if cfg.evaluation.every is not None:
        check_metrics(cfg.evaluation.metrics, cfg.evaluation.networks)


def start_beside(cfg: Config) -> None:
    """Starts a follower of a run as a Ray job of its own, if evaluation.every asks for one; Ray is connected."""
    if cfg.evaluation.every is None:
        return
    # Found in the job's working directory as well as where the package is installed on the nodes.
    command = f"python -m ddpm_dist.commands evaluate --follow {shlex.quote(cfg.run.url)}"
    started = submit_beside(command)
    if started is None:
        log.warning("evaluation.every: no follower runs; start it by hand: %s", command)
    else:
        log.info("evaluation.every: snapshots are evaluated by the Ray job %s", started)


def pending_steps(cfg: Config, folder: str, order: Order) -> list[int]:
    """Steps of whole snapshots without a result of these metrics, oldest first."""
    snapshots = storage.join(cfg.run.url, "snapshots")
    every = cfg.evaluation.every or 1
    steps = [int(name) for name in storage.list_names(snapshots) if name.isdigit()]
    wanted = [step for step in steps if step % every == 0 or step == cfg.train.steps]
    have = {result["step"] for result in results(folder) if answers(result, order)}
    return [
        step
        for step in sorted(set(wanted) - have)
        if storage.exists(storage.join(snapshot_url(cfg.run.url, step), "model_index.json"))
    ]


def answers(result: Mapping[str, Any], order: Order) -> bool:
    """Whether a result is one of what the order asks for."""
    asked = result["asked"]
    return bool(asked["metrics"] == list(order.metrics) and asked["num_samples"] == order.num_samples)


def show(cfg: Config, folder: str, order: Order) -> None:
    """Curves, best.json and the report of all results that there are; each point is drawn once."""
    drawn = storage.list_names(storage.join(cfg.run.url, EVENTS, "evaluation"))
    found = [result for result in results(folder) if answers(result, order) and result["step"] is not None]
    for result in found:
        number = int(result["name"][-8:], 16)  # of its question: the file's name tells that its points are drawn
        if not any(name.endswith(f".a{number}.0") for name in drawn):
            events = EventLog(cfg.run.url, attempt=number, start_step=None, name="evaluation")
            values = {f"evaluation/{name}": value for name, value in result["metrics"].items()}
            events.scalars(values, result["step"])
            events.close()
    best = mark_best(folder)
    if best is not None:
        log.info("best so far: %s = %.4f at step %s", best["metric"], best["value"], best["step"])
        write_report(cfg)


def mark_best(folder: str) -> dict[str, Any] | None:
    """Writes best.json: the snapshot with the best value of the results' first metric."""
    rated = [(next(iter(r["metrics"].items())), r) for r in results(folder) if r["metrics"] and r["snapshot"]]
    if not rated:
        return None
    name = rated[-1][0][0]
    comparable = [(value, result) for (metric, value), result in rated if metric == name]
    sign = -1 if name.startswith(LARGER_IS_BETTER) else 1
    value, result = min(comparable, key=lambda pair: (sign * pair[0], pair[1]["step"] or 0))
    best = {"snapshot": result["snapshot"], "step": result["step"], "metric": name, "value": value}
    storage.publish(storage.join(folder, "best.json"), (json.dumps(best, indent=2) + "\n").encode())
    return best


def _evaluate_one(cfg: Config, order: Order, folder: str, step: int, workers: tuple[int, int]) -> bool:
    """One snapshot; False if there was no room for it now."""
    url = snapshot_url(cfg.run.url, step)
    log.info("evaluating the snapshot of step %d", step)
    try:
        result = job.run(order.for_snapshot(url, folder), workers, cfg.cluster)
    except ClusterError as error:
        log.warning("step %d waits: %s", step, error)
        return False
    if result["step"] != step:
        raise EvaluationError(f"{storage.redact(url)}: its info says step {result['step']}; was it renamed?")
    storage.discard(storage.join(folder, "unkept"))  # of an evaluation that was killed at its end
    show(cfg, folder, order)
    return True
