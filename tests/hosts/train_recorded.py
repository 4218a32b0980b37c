"""`launch/train.py` whose workers write down, on their host's own disk, the keys of each batch that they train on."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
PAUSE_S = 2.0
"""Before each batch of a lone worker, so that it doesn't finish the run before its companion is back."""
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ddpm_dist import cli  # noqa: E402
from ddpm_dist.data.loader import Batch, Loader  # noqa: E402
from ddpm_dist.recipe import parse_config  # noqa: E402
from ddpm_dist.training.entry import ray_worker  # noqa: E402


def record_of(run_url: str, home: Path) -> Path:
    """The file of a run on a host: a JSON object a line."""
    return home / f"batches-{run_url.rpartition('/')[2]}.jsonl"


def recorded_batches(loader: Loader, start_step: int, record: Path, original: Any) -> Iterator[Batch]:
    """What the loader gives, with a line for each batch before it is trained on."""
    group = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = {"group": group, "rank": dist.get_rank(), "world": dist.get_world_size()}
    for batch in original(loader, start_step):
        time.sleep(PAUSE_S if dist.get_world_size() == 1 else 0)
        with record.open("a") as out:
            out.write(json.dumps({**who, "time": time.time(), "step": batch.step, "keys": batch.keys}) + "\n")
        yield batch


def recorded_worker(arguments: dict[str, Any], token: str, preempted: Callable[[], bool]) -> None:
    record = record_of(parse_config(arguments["config"]).run.url, Path.home())
    Loader.batches = partialmethod(recorded_batches, record=record, original=Loader.batches)  # type: ignore
    ray_worker(arguments, token, preempted)


if __name__ == "__main__":
    from ddpm_dist.commands import train
    from tests.hosts import train_recorded  # by its own name, so that ranks find it

    train.ray_worker = train_recorded.recorded_worker  # type: ignore[attr-defined]
    cli.run(train.main)
