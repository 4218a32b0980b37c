"""What launch/train.py does, with workers that record their steps: `recorded_job.py FOLDER key=value …`."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ddpm_dist import cli
from ddpm_dist.cluster import preemption_announced, train_on_ray
from ddpm_dist.engine.world import init_world
from ddpm_dist.recipe import dump_config, load_config, parse_config
from ddpm_dist.state.history import latest_step
from ddpm_dist.training import run_folder
from ddpm_dist.training.entry import finished, ray_worker, report_end
from tests.integration import loop_ranks


def recorded(arguments: dict[str, Any], token: str, folder: str) -> None:
    """A rank under Ray."""
    cfg = parse_config(arguments["config"])
    death = _death(Path(folder))
    loop_ranks.install(init_world(cfg.cluster), cfg.run.url, loop_ranks.Faults(record=folder, die_in_copy=death))
    ray_worker(arguments, token, preemption_announced)


def _death(folder: Path) -> tuple[int, int, str] | None:
    """How this attempt ends in its first copy, by deaths.json: {attempt that made a step, from 0: [rank, where]}."""
    plan = folder / "deaths.json"
    if not plan.exists():
        return None
    attempt = max([int(path.stem.split("-")[1]) for path in folder.glob("steps-*")], default=0)
    rank, where = json.loads(plan.read_text()).get(str(attempt), (None, ""))
    return None if rank is None else (rank, 0, where)


def main(argv: object) -> None:
    folder, *overrides = sys.argv[1:]
    cfg = load_config(loop_ranks.ROOT / "configs/digits.yaml", overrides)
    assert parse_config(dump_config(cfg)) == cfg
    token = run_folder.new_token()
    if not finished(cfg, token):
        from tests.integration import recorded_job  # by its own name, so that workers find it

        train_on_ray(cfg, partial(recorded_job.recorded, token=token, folder=folder), partial(latest_step, cfg.run.url))
    report_end(cfg)


if __name__ == "__main__":
    cli.run(main)
