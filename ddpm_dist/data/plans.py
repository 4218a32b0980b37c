"""What make_shards says of a set before it makes it: `plan.json`. Whoever touches the folder asks here if it is done.

A plan without an index is a set that isn't finished, however many whole shards there are; an index that
another tool made of it in the meantime has too few samples, and nothing else would show it.
"""

import json
from dataclasses import dataclass
from typing import Any

from ddpm_dist import storage
from ddpm_dist.errors import ConfigError, NotFoundError

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class PlanHead:
    """What of a plan decides whether a set is whole."""

    source: str
    """Kind and inputs, for messages."""
    samples: int
    samples_per_shard: int
    skip_bad: bool

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def samples_of(self, number: int) -> int:
        """Samples of a shard, those that --skip-bad leaves out among them."""
        return min(self.samples_per_shard, self.samples - number * self.samples_per_shard)

    def misses(self, counts: dict[str, int]) -> str | None:
        """What a set with so many samples in its shards lacks of this plan, or has beside it; None if it is whole."""
        wanted = {shard_name(number): self.samples_of(number) for number in range(self.shards)}
        missing = sorted(wanted.keys() - counts.keys())
        if missing:
            return f"{len(missing)} of its {len(wanted)} shards, {missing[0]} the first, are missing"
        other = sorted(counts.keys() - wanted.keys())
        if other:
            return f"{other[0]} is not among its {len(wanted)} shards"
        for name, planned in wanted.items():
            if counts[name] > planned or (counts[name] < planned and not self.skip_bad):
                return f"{name} has {counts[name]} samples and not {planned}"
        return None


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def plan_at(url: str) -> PlanHead | None:
    """The plan of a set that make_shards made or began; None where there is no plan.json, or somebody else's."""
    try:
        return parse_plan(storage.read(storage.join(url, PLAN_NAME)))
    except NotFoundError:
        return None


def parse_plan(data: bytes) -> PlanHead | None:
    """None for what isn't a plan of make_shards."""
    try:
        values: Any = json.loads(data)
        head = PlanHead(
            " ".join([values["kind"], *values["options"]["inputs"]]),
            values["samples"],
            values["samples_per_shard"],
            bool(values.get("skip_bad", False)),
        )
        whole = all(isinstance(number, int) and number > 0 for number in (head.samples, head.samples_per_shard))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return head if whole else None


def refuse_unfinished(url: str, names: set[str]) -> PlanHead | None:
    """The plan of a folder whose shards are all there; ConfigError for a set that make_shards didn't finish.

    names: the shards that are there.
    """
    plan = plan_at(url)
    if plan is None:
        return None
    missing = sum(shard_name(number) not in names for number in range(plan.shards))
    if missing:
        raise ConfigError(
            f"{storage.redact(url)}: make_shards ({plan.source}) began this data set and didn't finish it: {missing} "
            f"of {plan.shards} shards are missing; the same make_shards command goes on from here. To keep what is "
            f"there as a set of its own, copy the shards to another folder"
        )
    return plan
