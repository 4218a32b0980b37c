"""Whether a data set that was begun is the one that is asked for now: by the content of its input, not by its name.

A mark stands for the items of one shard: their names, sizes or checksums, and labels. Shards whose marks are the same
can be continued from anywhere; a shard that was made of other items can't stand beside those that are made now.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ddpm_dist.data.sources import Source
from ddpm_dist.data.sources.base import normal
from ddpm_dist.data.sources.labels import NONE

COMPARED = ("kind", "samples", "samples_per_shard", "format", "quality", "channels", "shuffle_seed", "skip_bad", "run")


def mark(source: Source, items: Iterable[int]) -> str:
    """Changes with the items of a shard, their order, and the class names."""
    digest = hashlib.blake2b(repr(source.class_names).encode("utf-8", "backslashreplace"), digest_size=8)
    for i in items:
        found = source.fingerprint(i)
        digest.update(len(found).to_bytes(8, "little") + found)
    return digest.hexdigest()


def differences(there: Mapping[str, Any], now: Mapping[str, Any], finished: Collection[int]) -> dict[str, str]:
    """{what differs between two plans: how}.

    finished: shards that are there already; the others may be made of other items than were planned, such as of a
    whole image in a damaged one's place.
    """
    found = {key: (there.get(key), now[key]) for key in COMPARED if there.get(key) != now[key]}
    old, new = there.get("options", {}), now["options"]
    found |= {"size": (old.get("size"), new["size"])} if old.get("size") != new["size"] else {}
    if "marks" not in there:  # version 0.1.0
        found |= {key: pair for key, pair in _by_name(old, new).items() if pair[0] != pair[1]}
    differs = {key: f"{key}: {before} there, {after} now" for key, (before, after) in found.items()}
    if "marks" in there and set(found) <= {"skip_bad"}:  # anything else deals other items to a shard
        changed = [n for n in sorted(finished) if there["marks"][n] != now["marks"][n]]
        if changed:
            differs["input"] = (
                f"input: {len(changed)} of {len(finished)} finished shards, number {changed[0]} first, were made of "
                f"files or labels that are others now"
            )
    return differs


def _by_name(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    labels = [asked if asked in (None, NONE) else normal(asked) for asked in (old.get("labels"), new["labels"])]
    return {
        "inputs": ([normal(place) for place in old.get("inputs", [])], list(new["inputs"])),
        "split": (old.get("split") or "train", new["split"] or "train"),
        "labels": (labels[0], labels[1]),
    }
