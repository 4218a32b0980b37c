"""A run's folder: who may use it, with which configuration, and what it says when the run ends.

run.url/
  config.yaml     the resolved configuration
  lease.json      who trains here now, renewed every few seconds
  stop            created by anybody: the run saves and leaves
  summary.json    what the last attempt ended with
  checkpoints/    training states (state/store.py)
  snapshots/      EMA weights as diffusers folders, one per step (the room snapshot)
  averages/       power averages, likewise, where ema.power asks for them
  tensorboard/    samples/    evaluation/    failures/
"""

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.errors import AccessError, ClaimError, ConfigError, NotFoundError, StorageError
from ddpm_dist.recipe import differences, dump_config
from ddpm_dist.snapshot import check_folder
from ddpm_dist.training.saved import binding_config, saved_config, with_streams

log = logging.getLogger(__name__)

RENEW_S = 4.0
LEASE_S = 20.0
"""A lease that isn't renewed for so long belongs to a dead attempt."""
_LEASE = {"token": str, "host": str, "boot": str, "pid": int, "step": int, "time": int | float}
_SUMMARY = {"step": int, "images_seen": int, "images_per_second": int | float, "data_wait_fraction": int | float}
AWAITED = 4
"""Most training states that wait for their snapshot's evaluation: where nobody evaluates, they would pile up."""


def check(cfg: Config) -> None:
    """Checks that the folder can be reached, and that this configuration may go on with the run in it, if any.

    Writes nothing. Raises StorageError, or ConfigError with the list of identity keys that differ.
    """
    storage.check_access(cfg.run.url, "run.url")
    old = binding_config(cfg.run.url)
    if old is None:
        return
    found = differences(old, with_streams(cfg, old))
    if found["identity"]:
        raise ConfigError(
            f"run.url: {cfg.run.url} holds a run of another configuration:\n  "
            + "\n  ".join(found["identity"])
            + "\nUse another run.url for this one (run.init_from takes weights along), or the old values to go on."
        )


def adopt(cfg: Config) -> None:
    """Makes this the run's configuration, and forgets an old wish to stop; for the folder's owner alone."""
    old = saved_config(cfg.run.url)
    cfg = with_streams(cfg, old)
    text = dump_config(cfg)
    for change in differences(old, cfg)["schedule"] if old is not None else ():
        log.info("the schedule changes: %s", change)
    if old is None or dump_config(old) != text:
        storage.publish(storage.join(cfg.run.url, "config.yaml"), text.encode())
    _forget_stop(storage.join(cfg.run.url, "stop"))


def take_over(run_url: str, token: str) -> None:
    """Waits until nobody else trains in this folder; ClaimError if somebody goes on doing so.

    token: names the job, which may own the lease already (Ray started its workers again).
    """
    seen = _read_lease(run_url)
    if seen is None or seen.get("released") or seen["token"] == token or _is_dead_here(seen):
        return
    log.info("run.url: the lease of %s is not released; waiting %.0f s for a sign of life", _owner(seen), LEASE_S)
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = _read_lease(run_url)
        if now is None or now.get("released") or _is_dead_here(now):
            return
        if now != seen:
            raise ClaimError(
                f"run.url: {run_url} is in use by {_owner(now)}, at step {now['step']}; wait for it, use another "
                f"run.url, or end it by an object `stop` in that folder"
            )
    log.info("run.url: %s gave no sign of life; its lease is taken over", _owner(seen))


class Lease:
    """Shows that this process trains in the folder, and notices the `stop` object there.

    check_owner: raises a ClaimError once the run belongs to a newer attempt, whose lease is then left alone.
    """

    def __init__(self, run_url: str, token: str, check_owner: Callable[[], None] = lambda: None) -> None:
        self._url = storage.join(run_url, "lease.json")
        self._stop_url = storage.join(run_url, "stop")
        self._token = token
        self._check_owner = check_owner
        self._lost: ClaimError | None = None
        self._beat = 0
        self._ended = threading.Event()
        self.step = 0
        self.stop_requested = False
        self._renew(released=False)
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """ClaimError if this attempt was seen to own the run no more."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Lets another job begin at once; a lease that isn't ours any more is left alone."""
        self._ended.set()
        self._thread.join()
        try:
            self._renew(released=True)
        except ClaimError as error:
            log.warning("%s", error)
            return
        if self.stop_requested:
            try:
                _forget_stop(self._stop_url)
            except StorageError as error:
                log.warning("%s", error)

    def _work(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self._renew(released=False)
                self.stop_requested = self.stop_requested or storage.exists(self._stop_url, patience_s=RENEW_S)
            except StorageError as error:
                log.warning("the lease was not renewed: %s", error)
            except ClaimError as error:
                self._lost = error
                return

    def _renew(self, released: bool) -> None:
        self._check_owner()
        self._beat += 1
        lease = {
            "token": self._token,
            "host": platform.node(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "step": self.step,
            "beat": self._beat,
            "time": time.time(),
            "released": released,
        }
        storage.publish(self._url, json.dumps(lease).encode(), patience_s=RENEW_S)


def _forget_stop(url: str) -> None:
    """Removes the wish to stop, if there is one."""
    try:
        storage.delete(url)
    except AccessError as error:
        raise AccessError(f"{error}; as long as this object is there the run stops: remove it") from None


def new_token() -> str:
    """Names one job, over all the attempts that its launcher makes."""
    return uuid.uuid4().hex


def steps_to_keep(cfg: Config, steps: Sequence[int]) -> set[int]:
    """Of these steps with a training state, those that evaluation wants to outlive checkpoint.keep_last.

    Those of the best snapshots so far (evaluation/best.json: one for each question that was asked of the run), and the
    newest of those that evaluation.every is going to rate: one of them may be the next best. An answer to another
    question doesn't rate a step.
    """
    folder = storage.join(cfg.run.url, "evaluation")
    best = _read_json(storage.join(folder, "best.json"), {"step": int})
    keep = set(_best_steps(best))
    every = cfg.evaluation.every
    if every is not None:
        rated = set() if best is None else _rated(folder, best.get("question"))
        due = [s for s in steps if s % every == 0 and s % cfg.checkpoint.snapshot_every_steps == 0]
        keep |= set(sorted(step for step in due if f"{step:09d}" not in rated)[-AWAITED:])
    return keep.intersection(steps)


def _best_steps(best: dict[str, Any] | None) -> Iterator[int]:
    others = best.get("others") if best else None
    for entry in (best, *(others if isinstance(others, list) else ())):
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry["step"]


def _rated(folder: str, question: object) -> set[str]:
    """Steps, as they begin a result's name, that have an answer to a question; none: to any, as 0.1.0 had it."""
    names = [name.removesuffix(".json").split("-") for name in storage.list_names(storage.join(folder, "results"))]
    return {parts[0] for parts in names if not isinstance(question, str) or parts[-2:-1] == [question[:8]]}


def write_summary(run_url: str, summary: dict[str, Any]) -> None:
    """What an attempt ended with, in place of what the one before wrote."""
    storage.publish(storage.join(run_url, "summary.json"), json.dumps(summary, indent=2).encode())


def read_summary(run_url: str) -> dict[str, Any] | None:
    """What the last attempt ended with; None where none has ended."""
    return _read_json(storage.join(run_url, "summary.json"), _SUMMARY)


def snapshot_url(run_url: str, step: int) -> str:
    """Zero-padded, so that names sort by step."""
    return storage.join(run_url, "snapshots", f"{step:09d}")


def has_snapshot(run_url: str, step: int) -> bool:
    """Whether the snapshot of a step is whole."""
    return storage.exists(storage.join(snapshot_url(run_url, step), "model_index.json"))


def newest_snapshot(run_url: str) -> str | None:
    """URL of the snapshot with the highest step; None if there is none yet."""
    steps = [name for name in storage.list_names(storage.join(run_url, "snapshots")) if name.isdigit()]
    for name in sorted(steps, reverse=True):
        url = storage.join(run_url, "snapshots", name)
        if storage.exists(storage.join(url, "model_index.json")):
            return url
    return None


def snapshot_at(url: str) -> str:
    """What a URL means where a snapshot is asked for: itself, or the newest one of a run's folder."""
    if storage.exists(storage.join(check_folder(url), "model_index.json")):
        return url
    return newest_snapshot(url) or url


def last_sign_of_life(run_url: str) -> float | None:
    """Unix time of the newest lease, for the account of lost time; None in a new run."""
    lease = _read_lease(run_url)
    return lease["time"] if lease else None


def _read_lease(run_url: str) -> dict[str, Any] | None:
    return _read_json(storage.join(run_url, "lease.json"), _LEASE)


def _read_json(url: str, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
    """An object that has these keys with values of these kinds; None if there is none, or if it is damaged or not ours:
    it is written anew."""
    try:
        found = json.loads(storage.read(url))
    except NotFoundError:
        return None
    except ValueError:
        found = None
    if isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        return found
    log.warning("%s is damaged, or not ours; it will be written anew", storage.redact(url))
    return None


def _is_dead_here(lease: dict[str, Any]) -> bool:
    """Whether the owner was a process of this boot of this host that is gone, so that no wait is needed."""
    if lease["boot"] != _boot_id() or lease["host"] != platform.node():
        return False
    try:
        state = Path(f"/proc/{lease['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _owner(lease: dict[str, Any]) -> str:
    return f"process {lease['pid']} on {lease['host']}"
