"""The part `follow` of tools/bench/training.py: a training's images/s beside a follower that never stops evaluating."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ddpm_dist import storage
from ddpm_dist.config import Config
from tools.bench.training_sides import Side, ours
from tools.local.ray_cluster import RayCluster
from tools.local.s3_server import ROOT

DEADLINE_S = 300.0
SETTINGS = (
    "evaluation.num_samples=1000000", "evaluation.metrics=[frechet_lite0]", "sampling.sampler=ddim",
    "sampling.steps=10", "sampling.batch_size=16", "sampling.unit_size=16",
)  # fmt: skip
"""So many samples that the follower is busy for as long as it lives, in units small enough to see it work."""


def bench_follow(configure: Callable[..., Config], cores: Sequence[int], steps: int, rounds: int) -> dict[str, float]:
    """Images/s with a follower on another core, over those without one.

    configure: makes a run's configuration. cores: of the training. The caller's own core is the follower's.
    """
    cfg = configure(f"checkpoint.snapshot_every_steps={steps}", "logging.grid_images=0", *SETTINGS)
    ratios = []
    with RayCluster(1, os.environ) as cluster, Side(ours, 1, cores, cfg, steps) as training:
        training.turn()  # until its first snapshot
        for number in range(rounds):
            rates = {}
            for followed in (True, False) if number % 2 else (False, True):
                with _follower(cfg, cluster) if followed else contextlib.nullcontext():
                    rates[followed] = training.turn()["rate"]
            ratios.append(rates[True] / rates[False])
            print(
                f"training {rates[True]:.2f} images/s with a follower, {rates[False]:.2f} without, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    return {"training_with_follower": statistics.median(ratios)}


@contextlib.contextmanager
def _follower(cfg: Config, cluster: RayCluster) -> Iterator[None]:
    """A follower of the run, as a Ray job, that is at work."""
    name = f"follower-{time.monotonic_ns()}"
    command = ["python", "launch/evaluate.py", "--follow", cfg.run.url, "--workers", "1"]
    before = _units(cfg)
    _ray(cluster, "submit", "--no-wait", "--submission-id", name, "--working-dir", str(ROOT), "--", *command)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while _units(cfg) <= before:
            if time.monotonic() > deadline:
                raise SystemExit(f"the follower drew nothing in {DEADLINE_S:.0f} s; its log: `ray job logs {name}`")
            time.sleep(0.5)
        yield
    finally:
        _ray(cluster, "stop", name)


def _units(cfg: Config) -> int:
    """Units of samples that the follower has drawn so far."""
    return len(
        [n for n in storage.list_objects(f"{cfg.run.url}/evaluation") if n.endswith(".json") and "receipts" in n]
    )


def _ray(cluster: RayCluster, *words: str) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    quiet = subprocess.DEVNULL
    subprocess.run([ray, "job", *words], env=cluster.env, cwd=ROOT, check=True, stdout=quiet, stderr=quiet)
