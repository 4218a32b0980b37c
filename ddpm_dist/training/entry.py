"""What the launch scripts call: checks before any worker starts, and a worker under either launcher."""

import logging
import signal
from collections.abc import Callable
from typing import Any

from ddpm_dist import cli, device as devices
from ddpm_dist.cluster import lasting_memory, tell
from ddpm_dist.config import Config
from ddpm_dist.data import Loader
from ddpm_dist.engine import World, broadcast_object, init_world
from ddpm_dist.errors import ConfigError, DdpmDistError
from ddpm_dist.recipe import dump_config, parse_config
from ddpm_dist.state import latest_step
from ddpm_dist.training import run_folder
from ddpm_dist.training.branch import resolve
from ddpm_dist.training.loop import Training

log = logging.getLogger(__name__)


def finished(cfg: Config, token: str) -> bool:
    """Checks run folder, owner and data, so that a mistake shows before a worker starts. cfg: as `resolve` gives it.

    Returns whether the run has nothing left to do. token: names this job (run_folder.new_token).
    """
    devices.check_training(cfg.cluster)
    run_folder.check(cfg)
    run_folder.take_over(cfg.run.url, token)
    Loader(cfg, rank=0, world=cfg.worker_range[0]).close()
    step, steps = latest_step(cfg.run.url) or 0, cfg.train.steps
    if step > steps:
        raise ConfigError(
            f"train.steps: {steps} is less than the {step} steps that this run has done; it may only grow"
        )
    run_folder.adopt(cfg)
    # A kill at the very end can leave the last state without what is published after it.
    summary = run_folder.read_summary(cfg.run.url)
    told = summary is not None and summary["step"] == steps
    return step == steps and told and run_folder.has_snapshot(cfg.run.url, steps)


def ray_worker(arguments: dict[str, Any], token: str, preempted: Callable[[], bool]) -> None:
    """One rank of a Ray cluster. arguments: {"config": resolved YAML}. preempted: see `Training`."""
    cli.setup_logging()
    cfg = parse_config(arguments["config"])
    world = init_world(cfg.cluster)
    tell("group")
    _train(Training(cfg, world, token, preempted, lasting_memory()))


def deepspeed_worker(cfg: Config) -> World:
    """One rank under DeepSpeed's launcher, or alone; rank 0 makes the checks for all."""
    world = init_world(cfg.cluster)
    token, done, error = run_folder.new_token(), False, None
    if world.is_first:
        try:
            _check_size(cfg, world.size)
            cfg = resolve(cfg)
            done = finished(cfg, token)
        except DdpmDistError as caught:
            error = caught
    token, done, failed, text = broadcast_object(world, (token, done, error is not None, dump_config(cfg)))
    cfg = parse_config(text)
    if error is not None:
        raise error
    if not done and not failed:
        if cfg.checkpoint.memory_every_steps is not None and world.is_first:
            log.warning(
                "checkpoint.memory_every_steps: has no effect without Ray, where supervisors outlive their workers"
            )
        training = Training(cfg, world, token)
        signal.signal(signal.SIGTERM, lambda *_: training.ask_to_stop())
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: _stop_at_first(training))
        _train(training)
    return world


def _check_size(cfg: Config, size: int) -> None:
    """ConfigError where a launcher started a number of processes that the batch can't be shared by."""
    batch = cfg.train.global_batch
    if batch % size:
        near = [w for w in range(1, batch + 1) if batch % w == 0]
        below, above = max(w for w in near if w < size), min((w for w in near if w > size), default=batch)
        raise ConfigError(
            f"train.global_batch: {batch} can't be shared by the {size} processes that were started; start {below} or "
            f"{above}, or use another batch"
        )


def _stop_at_first(training: Training) -> None:
    """Ctrl-C saves and leaves, as SIGTERM does; once more, and it breaks off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log.warning("saving the state before this leaves; Ctrl-C once more leaves without it")
    training.ask_to_stop()


def report_end(cfg: Config) -> None:
    """One line about how the run stands."""
    summary = run_folder.read_summary(cfg.run.url)
    if summary is None:
        return
    state = "finished" if summary["step"] >= cfg.train.steps else "stopped; the same command continues"
    log.info(
        "%s at step %d (%s images), %.0f images/s, %.1f%% of the time waiting for data; snapshot: %s",
        state, summary["step"], f"{summary['images_seen']:,}", summary["images_per_second"],
        100 * summary["data_wait_fraction"], summary["snapshot"] or "none yet",
    )  # fmt: skip


def _train(training: Training) -> None:
    ended_well = False
    try:
        training.run()
        ended_well = True
    finally:
        training.close(ended_well)
