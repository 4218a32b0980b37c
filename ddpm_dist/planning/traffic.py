"""What the ranks send one another in a step, by ZeRO stage, and how long that takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_dist.engine import MAX_BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from ddpm_dist.planning.cards import Card
from ddpm_dist.planning.memory import stays_gathered
from ddpm_dist.planning.network import BYTES

REDUCED_BYTES = 4
"""Gradients travel in float32 (engine/start.py)."""
LATENCY_S = 10e-6
"""Of one hop between nodes: an assumption, as of InfiniBand and RoCE with the kernel out of the way."""
NEAR_LATENCY_S = 3e-6
"""Of one hop within a node: an assumption."""


@dataclass(frozen=True)
class Traffic:
    """Of one step. Bytes are those of the whole tensor that a collective is about, not those that a rank sends."""

    all_reduced: float
    """Summed, and the sum to everybody: gradients of stages 0, 1 and 2."""
    reduce_scattered: float
    """Summed, and each rank gets its share: gradients of stage 3."""
    gathered: float
    """Shares to everybody: weights."""
    collectives: int
    """Number of calls, each of which waits for the network's latency."""

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives), by the ring algorithm (Patarasu and Yuan 2009)."""
        return (2 * self.all_reduced + self.reduce_scattered + self.gathered) * (ranks - 1) / ranks


def traffic_of(numels: Sequence[int], stage: int, precision: str, accumulation: int) -> Traffic:
    """A step's collectives. numels: elements of each parameter. accumulation: micro-batches of the step.

    Read in DeepSpeed 0.19.8. Stages 0 and 1 reduce once a step, stages 2 and 3 in each
    micro-batch; stages 1 and 2 gather the new weights once, stage 3 gathers those that aren't persistent in each
    micro-batch (again for the backward pass where they aren't kept), and the persistent ones after the step.
    """
    total, weight = sum(numels), BYTES[precision]
    buckets = math.ceil(total / MAX_BUCKET_ELEMENTS)
    if stage == 3:
        cut = [numel for numel in numels if numel > PERSISTENT_ELEMENTS]
        kept, times = total - sum(cut), 1 if stays_gathered(total) else 2
        return Traffic(
            all_reduced=0,
            reduce_scattered=REDUCED_BYTES * total * accumulation,
            gathered=weight * (times * sum(cut) * accumulation + kept),
            collectives=accumulation * (buckets + times * len(cut)) + 1,
        )
    rounds = accumulation if stage == 2 else 1
    gathered = 0 if stage == 0 else weight * total
    gathers = 0 if stage == 0 else math.ceil(total / (2 * MAX_BUCKET_ELEMENTS))
    return Traffic(REDUCED_BYTES * total * rounds, 0, gathered, buckets * rounds + gathers)


def seconds(traffic: Traffic, ranks: int, nodes: int, card: Card, network: float) -> float:
    """How long a step's collectives take. network: bytes/s of a node to the others, in each direction.

    Rings pass through each node once, so the slower of a GPU's link and a node's network is what all of it waits for
    (with one rank on a node the link isn't used); a call waits for the hops of a tree, twice its depth.
    """
    if ranks == 1:
        return 0.0
    across = math.inf if nodes == 1 else network
    within = math.inf if ranks == nodes else card.link
    hops = 2 * (math.log2(max(1, nodes)) * LATENCY_S + math.log2(max(1, ranks / nodes)) * NEAR_LATENCY_S)
    return traffic.sent(ranks) / min(across, within) + traffic.collectives * hops
