"""A run's failures and restarts as discrete events, up to ten thousands of GPUs; the same seed gives the same days.

training ──failure of a process──▶ restart ──▶ training from the newest published state
    │
    └─failure of a node──▶ detection ──▶ a spare takes its place ──▶ restart ──▶ …
                                        └─none there: fewer GPUs, as many as divide the batch
"""

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, log2

from ddpm_dist.planning.checkpoint import Saving
from ddpm_dist.planning.failures import values


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times are seconds."""

    gpus: int
    nodes: int
    global_batch: int
    interval_s: float
    """Of work between two saves."""
    cost: Saving
    read_s: float
    """For the state to come back from the store."""
    mtbf_s: float
    """Of the whole run at its full size; with fewer nodes it grows."""
    constants: Mapping[str, float] = field(default_factory=values)

    def restart_s(self, node_lost: bool) -> float:
        """From the failure until training goes on, where a node is at hand."""
        c = self.constants
        grown = c["per_doubling"] * max(0.0, log2(self.gpus) - 1)
        base = c["node_detection"] + c["node_replacement"] if node_lost else 0.0
        return base + c["process_restart"] + grown + self.read_s


@dataclass(frozen=True)
class Outcome:
    """Where the time went. All but goodput and failures are shares of the time."""

    goodput: float
    """Steps that counted, at full speed."""
    failures: int
    saving: float
    lost: float
    """Computed, and computed again."""
    restarting: float
    slower: float
    """Missing speed while nodes were missing."""


def simulate(scenario: Scenario, days: float = 30.0, seed: int = 0) -> Outcome:
    """The run of so many days. Failures come exponentially, also while it restarts, which then begins anew."""
    return _Run(scenario, random.Random(seed)).until(days * 86400)  # noqa: S311 - a simulation


class _Run:
    """now: the time. Work is counted in seconds of the full size."""

    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        self._s, self._chance = scenario, chance
        self._now = 0.0
        share = scenario.constants["spares"]
        self._spares = max(1, ceil(share * scenario.nodes)) if share else 0
        self._nodes = scenario.nodes
        self._repairs: list[float] = []
        self._spent = dict.fromkeys(("useful", "saving", "lost", "restarting", "slower"), 0.0)
        self._failures = 0

    def until(self, end: float) -> Outcome:
        """Runs to the end, and says where the time went."""
        while self._now < end:
            self._train(end)
            if self._now < end:
                self._restart(end)
        shares = {name: value / self._now for name, value in self._spent.items()}
        return Outcome(
            shares["useful"], self._failures, shares["saving"], shares["lost"], shares["restarting"], shares["slower"]
        )

    def _train(self, end: float) -> None:
        """Until the next failure, the end, or a time when nodes are back and the run grows again, after a save."""
        s, speed = self._s, self._speed()
        failure = self._now + self._next_failure()
        back = self._repairs[0] if self._repairs and self._nodes < s.nodes else float("inf")
        stop = min(failure, end, back)
        period = s.interval_s / speed + s.cost.stall_s  # an interval is a number of steps
        whole, rest = divmod(stop - self._now, period)
        work = whole * s.interval_s + min(rest * speed, s.interval_s)
        if stop == failure:
            self._failures += 1
            published = max(0.0, (stop - self._now - s.cost.background_s) // period) * s.interval_s
        else:
            published = work
        self._spend("useful", published)
        self._spend("lost", work - published)
        self._spend("saving", whole * s.cost.stall_s)
        elapsed = stop - self._now
        self._spend("slower", max(0.0, elapsed - work - whole * s.cost.stall_s))
        self._now = stop
        self._node_lost = stop == failure and self._chance.random() >= s.constants["process_share"]
        if self._node_lost:
            self._nodes -= 1
            heapq.heappush(self._repairs, stop + s.constants["repair"])

    def _restart(self, end: float) -> None:
        """Fills up from spares and from what is repaired, and starts; failures in the meantime begin it anew."""
        lost = self._node_lost
        while True:
            if self._nodes + self._spares == 0:  # nothing is left: it waits for the first repair
                self._spend("restarting", self._repairs[0] - self._now)
                self._now = self._repairs[0]
            while self._repairs and self._repairs[0] <= self._now:
                heapq.heappop(self._repairs)
                self._spares += 1
            taken = min(self._spares, self._s.nodes - self._nodes)
            self._spares, self._nodes = self._spares - taken, self._nodes + taken
            took, failure = self._s.restart_s(lost), self._next_failure()
            if failure > took:
                self._spend("restarting", min(took, max(0.0, end - self._now)))
                self._now += took
                return
            self._spend("restarting", failure)
            self._now += failure
            self._failures += 1
            lost = self._chance.random() >= self._s.constants["process_share"]
            if lost:
                self._nodes -= 1
                heapq.heappush(self._repairs, self._now + self._s.constants["repair"])
            if self._now >= end:
                return

    def _speed(self) -> float:
        """Of the full size: the largest number of GPUs on the nodes that are there which divides the batch."""
        s = self._s
        there = s.gpus * self._nodes // s.nodes
        used = next((w for w in range(there, 0, -1) if s.global_batch % w == 0), 1)
        return used / s.gpus

    def _next_failure(self) -> float:
        return self._chance.expovariate(self._nodes / self._s.nodes / self._s.mtbf_s)

    def _spend(self, on: str, seconds: float) -> None:
        self._spent[on] += seconds
