"""Looks for what would keep a run from working on these nodes, and says what mends it.

    ddpm-doctor                                              this machine
    ddpm-doctor --config RECIPE run.url=… data.url=…         and what that run needs: store, data, memory, GPUs
    ray job submit -- ddpm-doctor --nodes 4 --config …       all nodes of a Ray cluster (or RAY_ADDRESS is set)
    srun --ntasks-per-node 1 ddpm-doctor --config …          those of a launcher: srun, mpirun, torchrun

Exit code 0: nothing fails; 1: the rows that are marked so do. It leaves nothing behind.
"""

import argparse
import sys
from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.config import Config
from ddpm_dist.doctor import as_json, as_report, as_table, examine
from ddpm_dist.errors import ConfigError
from ddpm_dist.recipe import load_config


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; an exit with an error if a row failed."""
    args = _parser().parse_intermixed_args(argv)
    if args.overrides and not args.config:
        raise ConfigError(f"{args.overrides[0]!r}: there is no --config that it could change")
    cfg = load_config(args.config, args.overrides) if args.config else None
    found = examine(cfg, args.nodes)
    if found.speaks:
        show = as_table(found)
        if args.json:
            show = as_json(found)
        elif args.report:
            show = as_report(found, _urls(cfg))
        print(show, flush=True)
    if found.failed:
        sys.exit(cli.EXIT_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cli.config_option(parser, "of the run that is to work here")
    parser.add_argument("--nodes", type=cli.positive, metavar="N", help="how many nodes there should be")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for programs")
    form.add_argument(
        "--report", action="store_true", help="to paste into an issue: without names of nodes, users, folders, buckets"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def _urls(cfg: Config | None) -> list[str]:
    if cfg is None:
        return []
    data = [cfg.data.url] if isinstance(cfg.data.url, str) else list(cfg.data.url)
    index = cfg.data.index
    indexes = [] if index is None else [index] if isinstance(index, str) else list(index.values())
    return [cfg.run.url, *data, *indexes, *([cfg.run.init_from] if cfg.run.init_from else [])]
