"""Follows a run: evaluates each new snapshot once, draws the curves, marks the best.

    evaluation/results/<name>.json       one per snapshot and question; what has its answer is not evaluated again
    evaluation/results.jsonl             all of them
    evaluation/best.json                 the snapshot with the best value of the first metric
    evaluation/grids/<name>.png          its first samples
    tensorboard/evaluation/<question>/   the curves, those of each question apart

It holds no resources between two snapshots, and the training never waits for it. Killed and started again,
it goes on with the snapshots that have no result; a sampling job that was broken off keeps its units. A snapshot
that can't be evaluated doesn't keep it from the others.
"""

import logging
import math
import shlex
import time
from typing import Any

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster import submit_beside
from ddpm_dist.config import Config
from ddpm_dist.errors import (
    AccessError,
    ClusterError,
    DdpmDistError,
    EvaluationError,
    SamplingError,
    SnapshotError,
    TaskFailedError,
    UnreachableError,
)
from ddpm_dist.evaluation import job
from ddpm_dist.evaluation.compare import open_networks
from ddpm_dist.evaluation.order import Order, check_metrics
from ddpm_dist.evaluation.question import Question, answered, ask, drawn_for
from ddpm_dist.evaluation.ranking import mark_best, snapshot_id_at
from ddpm_dist.evaluation.report import write_report
from ddpm_dist.evaluation.result import ENOUGH, remove_answered, results
from ddpm_dist.progress import clock
from ddpm_dist.training import EVENTS, EventLog
from ddpm_dist.training.run_folder import has_snapshot, last_sign_of_life, read_summary, snapshot_url

log = logging.getLogger(__name__)

POLL_S = 10.0
SAY_S = 300.0
QUIET_S = 1800.0
"""A run that shows no sign of life for so long is not waited for."""
HOPELESS = 3
"""Snapshots that fail where none is known to be damaged, and none succeeds, after which it is not their fault."""


def follow(
    cfg: Config, order: Order, workers: tuple[int, int], poll_s: float = POLL_S, quiet_s: float = QUIET_S
) -> int:
    """Evaluates snapshots until that of the last step (train.steps) has its answer; returns how many it did.

    It ends before that if the run shows no sign of life for quiet_s. order: what to compare with and how; its snapshot
    and folder are set for each snapshot. EvaluationError at the end names the snapshots that could not be evaluated.
    """
    question = question_of(cfg, order)
    show(cfg, question)  # an earlier follower may have been killed between a result and its curves
    waiting, failed, done = _Waiting(cfg, quiet_s), dict[int, Exception](), 0
    while True:
        pending = [step for step in pending_steps(cfg, question) if step not in failed]
        for step in pending:
            try:
                _evaluate_one(cfg, order, question, step, workers)
                done += 1
            except AccessError:
                raise  # of the whole run
            except (ClusterError, UnreachableError) as error:
                if isinstance(error, TaskFailedError):
                    _give_up(cfg, failed, step, error, done)
                else:
                    log.warning("step %d waits: %s", step, error)
            except Exception as error:  # whatever a damaged snapshot raises, the next one is not to wait for it
                _give_up(cfg, failed, step, error, done)
        if not pending and waiting.is_over():
            break
        time.sleep(poll_s)
    if failed:
        listed = "\n  ".join(f"step {step}: {_why(error)}" for step, error in failed.items())
        raise EvaluationError(
            f"{done} snapshots evaluated; {len(failed)} could not be, and are tried again when this is started again:"
            f"\n  {listed}"
        )
    return done


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


def question_of(cfg: Config, order: Order) -> Question:
    """What is asked of each snapshot of a run."""
    shape = (cfg.data.image_size, cfg.data.channels)
    drawn = drawn_for(order, cfg.model.num_classes, has_null=cfg.model.num_classes is not None)
    return ask(order, order.num_samples or ENOUGH, shape, drawn, open_networks(order, shape))


def pending_steps(cfg: Config, question: Question) -> list[int]:
    """Steps of whole snapshots without an answer to this question, oldest first.

    A snapshot that was made anew since its answer is pending again.
    """
    every = cfg.evaluation.every or 1
    steps = [int(name) for name in storage.list_names(storage.join(cfg.run.url, "snapshots")) if name.isdigit()]
    wanted = sorted({step for step in steps if step % every == 0 or step == cfg.train.steps})
    answers: dict[int, set[str]] = {}
    for result in results(_folder(cfg)):
        if answered(result, question) and result["step"] is not None:
            answers.setdefault(result["step"], set()).add(result["snapshot_id"])
    return [
        step
        for step in wanted
        if has_snapshot(cfg.run.url, step)
        and not (step in answers and snapshot_id_at(snapshot_url(cfg.run.url, step)) in answers[step])
    ]


def show(cfg: Config, question: Question) -> None:
    """Curves, best.json and the report of all results that there are; each point is drawn once."""
    folder = _folder(cfg)
    curve = f"evaluation/{question.count}-{question.id[:8]}"
    drawn = storage.list_names(storage.join(cfg.run.url, EVENTS, curve))
    found = [result for result in results(folder) if answered(result, question) and result["step"] is not None]
    for result in found:
        number = int(result["name"][-8:], 16)  # of its question: the file's name tells that its points are drawn
        if not any(name.endswith(f".a{number}.0") for name in drawn):
            events = EventLog(cfg.run.url, attempt=number, start_step=None, name=curve)
            values = {f"evaluation/{name}": value for name, value in result["metrics"].items()}
            events.scalars(values, result["step"])
            events.close()
    remove_answered(folder)
    best = mark_best(cfg.run.url, question)
    if best is not None:
        log.info("best so far: %s = %.4f at step %s", best["metric"], best["value"], best["step"])
        write_report(cfg)


def _folder(cfg: Config) -> str:
    return storage.join(cfg.run.url, "evaluation")


def _evaluate_one(cfg: Config, order: Order, question: Question, step: int, workers: tuple[int, int]) -> None:
    url = snapshot_url(cfg.run.url, step)
    log.info("evaluating the snapshot of step %d", step)
    said = snapshot.load_info(url)["step"]
    if said != step:
        raise EvaluationError(f"{storage.redact(url)}: its info says step {said}; was it renamed?")
    result = job.run(order.for_snapshot(url, _folder(cfg)), workers, cfg.cluster)
    if not answered(result, question):
        raise EvaluationError(
            f"{storage.redact(url)}: its classes or size are not those of its run's configuration; is it a snapshot of "
            "this run?"
        )
    show(cfg, question)


def _give_up(cfg: Config, failed: dict[int, Exception], step: int, error: Exception, done: int) -> None:
    """Notes that a snapshot can't be evaluated; raises where it is hardly the snapshot's fault."""
    if not has_snapshot(cfg.run.url, step):
        log.info("the snapshot of step %d was taken away", step)
        return
    failed[step] = error
    log.error("the snapshot of step %d can't be evaluated: %s", step, _why(error))
    others = [one for one in failed.values() if not isinstance(one, (SnapshotError, SamplingError))]
    if not done and len(others) >= HOPELESS:
        raise error


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, DdpmDistError) else f"{type(error).__name__}: {error}"


class _Waiting:
    """What a follower waits for, and how long."""

    def __init__(self, cfg: Config, quiet_s: float) -> None:
        self._cfg, self._quiet_s = cfg, quiet_s
        self._sign: Any = None
        self._alive_at: float | None = None
        self._said_at = -math.inf

    def is_over(self) -> bool:
        """Whether no further snapshot is to come, as far as the run's folder tells; says what it waits for."""
        url, last, now = self._cfg.run.url, self._cfg.train.steps, time.monotonic()
        if has_snapshot(url, last):
            return True
        summary = read_summary(url)
        if summary is not None and summary["step"] >= last:
            log.warning("the run has ended at step %d, but its last snapshot is gone", last)
            return True
        sign = last_sign_of_life(url)
        if self._alive_at is None or sign != self._sign:
            self._sign, self._alive_at = sign, now
        quiet_s = now - self._alive_at
        if quiet_s >= self._quiet_s:
            log.warning(
                "the run has shown no sign of life for %s, and has no snapshot of its last step (%d): it is not waited "
                "for; follow it again when it goes on",
                clock(quiet_s), last,
            )  # fmt: skip
            return True
        if now - self._said_at >= SAY_S:
            self._said_at = now
            log.info("waiting for the next snapshot; the last one will be that of step %d", last)
        return False
