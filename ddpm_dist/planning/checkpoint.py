"""A training state: its size, what saving costs, how often to save, and what failures leave of the time."""

import math
from dataclasses import dataclass

from ddpm_dist.state import awaited

MOMENTS = 2
COPY_BYTES_PER_S = 20e9
"""From a GPU to pinned memory: an assumption, as of PCIe 4 with 16 lanes."""
STALL_SHARE = 0.021
"""Of a step, that a save costs beside the copy: NOTES.md, "tools.bench.training, quiet"."""


def state_bytes(parameters: int, averages: int = 1) -> float:
    """Bytes of a training state: float32 weights, two moments and the averages of each element (contract 3).

    Manifest and tables come to it; tests/planning/test_checkpoint.py saves one and weighs it.
    """
    return 4.0 * parameters * (1 + MOMENTS + averages)


@dataclass(frozen=True)
class Saving:
    """What one save costs."""

    stall_s: float
    """That training waits."""
    background_s: float
    """Until it is published; a failure before loses it."""


def saving(
    parameters: int, averages: int, ranks: int, nodes: int, store: float, step_s: float, part_s: float
) -> Saving:
    """A save of `ranks` on `nodes`, each node with `store` bytes/s to the store: all write their shares at once,
    and the first rank sees in `part_s` each that the parts which it waits for are there, as if one after another."""
    size = state_bytes(parameters, averages)
    return Saving(
        STALL_SHARE * step_s + size / ranks / COPY_BYTES_PER_S, size / nodes / store + awaited(ranks) * part_s
    )


def young(stall_s: float, mtbf_s: float) -> float:
    """The best interval between saves to first order: sqrt(2 δ M) (Young 1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly(stall_s: float, mtbf_s: float) -> float:
    """The best interval to higher order (Daly 2006, equation 37): time of work between two saves.

    sqrt(2 δ M) [1 + 1/3 (δ / 2M)^½ + 1/9 (δ / 2M)] − δ where δ < 2 M, else M.
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    half = stall_s / (2 * mtbf_s)
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - stall_s


def best_interval(cost: Saving, mtbf_s: float, step_s: float) -> float:
    """Daly's, but not below what a save takes until it is published, nor below a step: seconds of work."""
    return max(daly(cost.stall_s, mtbf_s), cost.background_s, step_s)


def goodput(interval_s: float, cost: Saving, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that becomes steps which count, where failures come independently (exponentially).

    Daly 2006: the wall time of τ seconds of work is M e^(R/M) (e^((τ+δ)/M) − 1). Each failure also loses
    what was computed while the last state wasn't published yet, which is added to R.
    """
    lost = restart_s + cost.background_s
    if (interval_s + cost.stall_s + lost) / mtbf_s > 700:
        return 0.0  # e^700 is the largest float; nothing is ever done
    wall = mtbf_s * math.exp(lost / mtbf_s) * math.expm1((interval_s + cost.stall_s) / mtbf_s)
    return interval_s / wall
