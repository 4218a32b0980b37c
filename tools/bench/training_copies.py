"""The part `copies` of tools/bench/training.py: what copies in memory that outlives a worker cost a step."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from ddpm_dist.cluster import memory as memories
from ddpm_dist.cluster.memory import Memory
from ddpm_dist.config import Config
from ddpm_dist.engine.world import World
from ddpm_dist.training.copies import CopySteps
from tools.bench.training_sides import InTurns, Train, Turns, ours

EVERY = (10, 1)
"""Steps between two copies."""


def bench_copies(config: Callable[..., Config], side: Callable[[Train, Config], Any], rounds: int) -> dict[str, float]:
    """Mean step of a stretch with copies over that of the stretch without them beside it; medians over the pairs.

    Both are turns of one process, in alternating order, and nothing goes to the store meanwhile.
    """
    found = {}
    for every in EVERY:
        cfg = config(f"checkpoint.memory_every_steps={every}", "checkpoint.every_steps=10000000")
        ratios = []
        with side(partial(ours, kind=_Alternating), cfg) as training:
            training.turn(), training.turn()  # what happens once
            for _ in range(rounds):
                turns = [training.turn(), training.turn()]
                seconds = {turn["copying"]: statistics.mean(turn["step_s"]) for turn in turns}
                ratios.append(seconds[True] / seconds[False])
                print(
                    f"a copy each {every} steps: a step {1000 * seconds[True]:.1f} ms, without "
                    f"{1000 * seconds[False]:.1f}, ratio {ratios[-1]:.4f}",
                    flush=True,
                )
        found[f"copies_each_{every}_step_of_without"] = statistics.median(ratios)
    return found


class _Alternating(InTurns):
    """On, off, off, on, on …: so that neither always comes first."""

    def __init__(self, cfg: Config, world: World, token: str, steps: int, turns: Turns) -> None:
        descriptor = memories.create()
        assert descriptor is not None
        super().__init__(cfg, world, token, steps, turns, Memory(descriptor, None))
        assert self.store.outlives
        checkpoint = cfg.checkpoint.model_copy(update={"memory_every_steps": None})
        self._modes = {
            True: self.copies,
            False: CopySteps(cfg.model_copy(update={"checkpoint": checkpoint}), self.store),
        }
        self._number = 0

    def _about_turn(self) -> dict[str, Any]:
        copying = self.copies is self._modes[True]
        self._number += 1
        self.copies = self._modes[self._number % 4 in (0, 1)]
        return {"copying": copying}
