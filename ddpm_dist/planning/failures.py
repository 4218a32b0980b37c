"""How often a run of so many GPUs fails, and what a restart takes: constants with their sources."""

import math
from dataclasses import dataclass

PUBLISHED = ((1024, 7.9), (16384, 1.8))
"""(GPUs, hours between failures): Meta's clusters, "Revisiting Reliability in Large-Scale Machine Learning Research
Clusters" (Kokolis et al. 2024)."""


def hours_between_failures(gpus: int) -> float:
    """Of a run: by the published points, on a power law between them, and by the nearest one's GPU-hours beyond."""
    (few, long), (many, short) = PUBLISHED
    if gpus <= few:
        return few * long / gpus
    if gpus >= many:
        return many * short / gpus
    return long * (gpus / few) ** (math.log(short / long) / math.log(many / few))


@dataclass(frozen=True)
class Constant:
    """A number that the simulation rests on."""

    value: float
    unit: str
    meaning: str
    source: str


CONSTANTS = {
    "process_restart": Constant(
        13.6, "s", "SIGKILL of a rank to the next new step, state read included",
        'measured, one worker: NOTES.md, "tools.bench.training, quiet"',
    ),
    "node_detection": Constant(
        12.0, "s", "until Ray gives up a node that is silent", "docs/cluster.md, with the settings that stand there",
    ),
    "node_replacement": Constant(
        20.0, "s", "a spare node's processes start, import and join",
        'assumed, above the cold first image of NOTES.md, "Sampling and evaluation" (18.5 s)',
    ),
    "per_doubling": Constant(
        2.0, "s", "more for each doubling of the ranks beyond 2, of a group's forming and of stragglers", "assumed",
    ),
    "per_part": Constant(
        0.005, "s", "rank 0 sees one of the parts of a state that it waits for (state/parts.py)",
        'measured, a server on the same machine: NOTES.md, "What a part of a state costs rank 0"',
    ),
    "process_share": Constant(
        0.5, "", "of failures that leave the node usable", "assumed; the rest takes a node away",
    ),
    "repair": Constant(4 * 3600.0, "s", "until a node that failed is there again, as a spare", "assumed"),
    "spares": Constant(0.02, "", "spare nodes per node, at least one", "assumed"),
}  # fmt: skip
"""By the name that --set takes."""


def values(**changed: float) -> dict[str, float]:
    """The constants' values by name, some of them changed."""
    return {name: constant.value for name, constant in CONSTANTS.items()} | changed
