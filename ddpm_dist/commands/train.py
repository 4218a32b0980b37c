"""Trains on a Ray cluster: `ray job submit -- ddpm-train --config RECIPE key=value …`.

Without a cluster (RAY_ADDRESS is not set) Ray is started on this machine alone.
"""

import os
from collections.abc import Sequence
from functools import partial

from ddpm_dist import cli
from ddpm_dist.cluster import connect_ray, preemption_announced, train_on_ray, warm_nodes
from ddpm_dist.engine import check_single
from ddpm_dist.evaluation.follow import check_config as check_follower, start_beside
from ddpm_dist.state import latest_step
from ddpm_dist.training import finished, ray_worker, report_end, resolve, run_folder


def main(argv: Sequence[str] | None) -> None:
    """Checks everything that can be checked without workers, then trains until the run is finished."""
    cfg = cli.config_from(cli.config_parser("Train a DDPM on a Ray cluster.").parse_intermixed_args(argv))
    check_single("ddpm-train")
    check_follower(cfg)
    if os.environ.get("RAY_ADDRESS"):  # a Ray of this machine alone would have to be started first, for nothing
        warm_nodes(cfg)
    cfg = resolve(cfg)
    token = run_folder.new_token()
    if not finished(cfg, token):
        connect_ray()
        start_beside(cfg)
        worker = partial(ray_worker, token=token, preempted=preemption_announced)
        train_on_ray(cfg, worker, partial(latest_step, cfg.run.url))
    report_end(cfg)
