"""What a run needs and takes, before it starts: memory, step, traffic, states, failures, days, and what else there is.

    ddpm-plan --config cifar10 --gpus 8
    ddpm-plan --config lsun256 --gpus 64 --nodes 8 --card a100 --network 50 --picture plan.svg
    ddpm-plan --config lsun256 --gpus 1024 --nodes 128 train.global_batch=8192 --simulate

Nothing is started, and no store is read. Each number that is assumed says so at the end.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm_dist import cli
from ddpm_dist.config import Precision
from ddpm_dist.errors import ConfigError
from ddpm_dist.planning import (
    CARDS,
    CONSTANTS,
    Outcome,
    Plan,
    Setting,
    advice,
    as_dict,
    as_svg,
    as_text,
    card_named,
    count,
    otherwise,
    plan_of,
    scenario_of,
    simulate,
    simulation_text,
)
from ddpm_dist.recipe import load_config

GB = 1e9
NOWHERE = ("run.url=file:///planned/run", "data.url=file:///planned/data")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan."""
    args = _parser().parse_intermixed_args(argv)
    card = card_named(args.card)
    nodes = args.nodes or -(-args.gpus // card.per_node)
    if args.gpus % nodes:
        raise ConfigError(f"--gpus {args.gpus}: can't be shared evenly by --nodes {nodes}")
    places = [f"cluster.workers={args.gpus}", f"cluster.gpus_per_worker={int(card.per_node > 1)}"]
    cfg = load_config(args.config, [*NOWHERE, *args.overrides, *places])
    setting = Setting(args.gpus, nodes, card, args.network * GB, args.images_per_second)
    counted, changed = count(cfg), dict(args.set or [])

    def again(
        place: Setting, stage: int | None = None, batch: int | None = None, precision: Precision | None = None
    ) -> Plan:
        hours = args.mtbf_hours and args.mtbf_hours * args.gpus / place.gpus
        other = cfg.model_copy(update={"precision": precision}) if precision else cfg
        return plan_of(other, place, args.store * GB, hours, None if precision else counted, stage, batch, changed)

    plan = again(setting)
    others = otherwise(cfg, plan, again)
    advised = advice(plan, others)
    name = Path(args.config).stem
    if args.picture:
        sizes = {one.plan.step.setting.gpus: one.plan for one in others if one.what.endswith("GPUs")}
        _write(args.picture, as_svg(f"{name} on {card.name}", list({**sizes, args.gpus: plan}.values())))
    outcomes = _simulated(plan, args, changed) if args.simulate else []
    if args.json:
        simulated = [{"what": what, **vars(outcome)} for what, outcome in outcomes]
        print(json.dumps({**as_dict(name, plan, others, advised), "simulated": simulated}, indent=2))
        return
    print(as_text(name, plan, others, advised))
    if outcomes:
        print(f"\n{simulation_text(outcomes, args.days, args.seed)}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--picture {path}: {error.strerror}") from None


def _simulated(plan: Plan, args: argparse.Namespace, changed: dict[str, float]) -> list[tuple[str, Outcome]]:
    """The plan at its best interval, at the recipe's, and with other failures, restarts and spares."""
    best = scenario_of(plan, plan.best_s, changed)
    constants = best.constants
    slow = {name: 4 * constants[name] for name in ("process_restart", "node_detection", "node_replacement")}
    rows: list[tuple[str, Any]] = [
        ("best interval", best),
        ("the recipe's interval", scenario_of(plan, plan.interval_s, changed)),
        ("failures twice as often", replace(best, mtbf_s=best.mtbf_s / 2)),
        ("failures half as often", replace(best, mtbf_s=best.mtbf_s * 2)),
        ("restarts four times as long", replace(best, constants={**constants, **slow})),
        (
            "restarts in an instant",
            replace(best, constants={**constants, **dict.fromkeys(slow, 0.0), "per_doubling": 0.0}),
        ),
        ("no spare nodes", replace(best, constants={**constants, "spares": 0.0})),
    ]
    return [(what, simulate(scenario, args.days, args.seed)) for what, scenario in rows]


def _assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name not in CONSTANTS or not equals or not number >= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=NUMBER from 0 on; names are {', '.join(CONSTANTS)}")
    return name, number


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cli.config_option(parser, "to plan", required=True)
    parser.add_argument("--gpus", type=cli.positive, required=True, help="training processes, one a GPU")
    parser.add_argument("--nodes", type=cli.positive, help="nodes that they are spread over; by default full ones")
    parser.add_argument("--card", default="h100", help=f"one of {', '.join(CARDS)} (default h100)")
    for option, name, default, text in (
        (
            "--network",
            "GB/S",
            50.0,
            "of a node to the others, each way, in 10^9 bytes/s (default 50, which is 400 Gbit/s)",
        ),
        ("--store", "GB/S", 1.0, "of a node to and from the store, in 10^9 bytes/s (default 1)"),
        ("--images-per-second", "N", None, "that one GPU trains, as measured, instead of a share of its peak"),
        ("--mtbf-hours", "H", None, "between failures of the whole run; by default as of published clusters"),
        ("--days", "N", 30.0, "that are simulated (default 30)"),
    ):
        parser.add_argument(option, type=_above_zero, default=default, metavar=name, help=text)
    parser.add_argument("--simulate", action="store_true", help="failures and restarts as events: how far they matter")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the simulation")
    parser.add_argument(
        "--set", type=_assignment, action="append", metavar="NAME=NUMBER",
        help=f"another constant of plan and simulation: {', '.join(CONSTANTS)}",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="step and memory by number of GPUs")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser
