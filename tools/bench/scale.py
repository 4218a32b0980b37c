"""What one rank of a very large run pays for a start, a step, a save and a resume, simulated on one machine.

    python -m tools.bench.scale [--shards 1000000] [--ranks 16384] [--batch 65536] [--json FILE]

No processes of the imaginary ranks are started: what a rank computes is a function of its number, so one process
computes what the dearest of them does (rank 0 where it has more to do). Seconds are of the processor, memory is what a
rank has for itself beyond its imports, requests and bytes are counted. Each figure stands beside the bound that it is
held to; the command ends with 1 if one is above.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.bench import scale_sides as sides
from tools.bench.scale_sides import Size, measured

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A figure with the most that it may be; None: it is only told."""

    what: str
    value: float
    unit: str
    bound: float | None = None

    @property
    def holds(self) -> bool:
        return self.bound is None or self.value <= self.bound

    def __str__(self) -> str:
        told = "" if self.bound is None else f"at most {self.bound:g}{'' if self.holds else '   ABOVE'}"
        return f"{self.what:58} {self.value:12.5g} {self.unit:9} {told}".rstrip()


def start(url: str, size: Size) -> list[Row]:
    largest = measured(sides.make_index, url, size).value
    cost = measured(sides.start, url, size, size.ranks // 3)
    return [
        Row("start: largest object that everybody reads", largest / MIB, "MiB", 64),
        Row("start: processor", cost.cpu_s, "s", 2),
        Row("start: memory", cost.memory_mib, "MiB", 64),
        Row("start: requests for the index, a host of 8 ranks", cost.value["requests"], "", 8),
        Row("start: samples in the rank's first blocks", cost.value["block samples"], ""),
    ]


def step(size: Size) -> list[Row]:
    found = measured(sides.steps, size, size.ranks // 3).value
    return [
        Row("step: order", 1e3 * found["seconds"], "ms", 1),
        Row("step: samples read for each that is used", found["amplification"], "", 1),
    ]


def states(url: str, size: Size, stage: int) -> list[Row]:
    name = f"ZeRO-{stage}"
    saved = measured(sides.save, url, stage, size.ranks)
    resumed = measured(sides.resume, url, stage, size.ranks // 2)
    owned = measured(sides.ownership, stage, size.ranks)
    return [
        Row(f"save, {name}: rank 0's manifest of all parts", saved.value["seconds"], "s", 1),
        Row(f"save, {name}: a rank's part", saved.value["part bytes"] / 1024, "KiB", 64),
        Row(f"save, {name}: manifest", saved.value["bytes"] / MIB, "MiB", 64),
        Row(f"resume, {name}: manifest decoded", resumed.value["decode seconds"], "s"),
        Row(f"resume, {name}: plan at half the ranks, decoding included", sum(
            resumed.value[key] for key in ("decode seconds", "plan seconds")), "s", 1),
        Row(f"resume, {name}: memory", resumed.memory_mib, "MiB"),
        Row(f"average, {name}: addresses gathered on each rank", owned.value["bytes"] / MIB, "MiB", 1),
    ]  # fmt: skip


def rows(size: Size, folder: str) -> list[Row]:
    url = sides.folder_of(folder)
    found = [*start(f"{url}/set", size), *step(size)]
    for stage in (1, 3):
        found += states(f"{url}/state-{stage}", size, stage)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("shards", 10**6), ("samples", 1000), ("ranks", 16_384), ("batch", 65_536)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    parser.add_argument("--json", metavar="FILE", help="the figures, also there")
    args = parser.parse_args()
    size = Size(args.shards, args.samples, args.ranks, args.batch)
    with tempfile.TemporaryDirectory(prefix="ddpm-scale-") as folder:
        found = rows(size, folder)
    print(f"{size.shards:,} shards of {size.samples:,} samples, {size.ranks:,} ranks, batch {size.batch:,}\n")
    print("\n".join(map(str, found)))
    if args.json:
        told = [{"what": r.what, "value": r.value, "unit": r.unit, "bound": r.bound} for r in found]
        Path(args.json).write_text(json.dumps({"size": vars(size), "rows": told}, indent=1))
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
