"""Trains under DeepSpeed's launcher: `deepspeed [--hostfile FILE] "$(which ddpm-train-deepspeed)" --config RECIPE …`.

Also alone, as `ddpm-train-deepspeed --config RECIPE …`: one process on this machine.
"""

from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.training import deepspeed_worker, report_end


def main(argv: Sequence[str] | None) -> None:
    """One process for each slot of the hostfile runs this."""
    parser = cli.config_parser("Train a DDPM under DeepSpeed's launcher.")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher; LOCAL_RANK is used")
    cfg = cli.config_from(parser.parse_intermixed_args(argv))
    world = deepspeed_worker(cfg)
    if world.is_first:
        report_end(cfg)
