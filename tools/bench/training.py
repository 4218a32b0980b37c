"""The training system beside bare loops, diffusers, DeepSpeed's and Ray's own ways. Each part in one run.

    python -m tools.bench.training                                   # all parts, about 50 minutes on 2 cores
    python -m tools.bench.training system diffusers --rounds 5
    python -m tools.bench.training save --steps 10 --rounds 2        # short

system     images/s of the whole system (stream from S3, ZeRO-1, EMA, log, a checkpoint each `--steps` steps) beside a
           bare PyTorch loop on tensors in memory, one worker; with --workers 2 beside DDP. Target: 0.97
diffusers  the same beside diffusers' unconditional example, with accelerate and its EMA. Target: 1.15
save       the step in which a checkpoint starts, over the median step (target: at most 1.10), beside the same with
           DeepSpeed's save_checkpoint and an upload of what it wrote
ema        an average's share of a step. Target: at most 0.01
copies     a step with copies in memory that outlives the worker, each 10 steps and each one, over one without. Target:
           1.02
memory     bytes of a rank's tensors by ZeRO stage, over the formula
resume     seconds to claim and read a state, by its size
follow     images/s of the system while a follower evaluates its snapshots on the servers' core, over those without one.
           Target: 0.98
restart    seconds from SIGKILL to the next new step, with 1 and 2 workers and several victims, and of a job's start,
           beside Ray Train's way with its own checkpoints

Workers run on the first core (the first cores, where there are several), servers on the last. The sides take turns;
ratios are medians over rounds, in pairs. The network lies between the digits' and CIFAR-10's: configs/cifar10.yaml with
--channels 32, 2.2M parameters, 32 images a step. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

from tools.bench.training_sides import Side, Train, bare, diffusers, engine_saving, ours  # noqa: E402  # isort: skip

import numpy as np  # noqa: E402

from ddpm_dist import cli, storage  # noqa: E402
from ddpm_dist.config import Config  # noqa: E402
from ddpm_dist.data import decode  # noqa: E402
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard  # noqa: E402
from ddpm_dist.recipe import load_config  # noqa: E402
from tools.bench.training_copies import bench_copies  # noqa: E402
from tools.bench.training_follow import bench_follow  # noqa: E402
from tools.bench.training_restart import bench_restart  # noqa: E402
from tools.bench.training_states import bench_memory, bench_resume  # noqa: E402
from tools.local.s3_server import S3Server  # noqa: E402

Found = dict[str, float]


class Bench:
    """A server with a data set, and the recipe that all sides train."""

    def __init__(self, args: argparse.Namespace, server: S3Server, cores: list[int]) -> None:
        self.args, self.server, self.workers = args, server, args.workers
        self.cores = cores
        self.url = f"s3://{server.bucket}"
        self._runs = 0
        _make_set(f"{self.url}/data", 4096)

    def config(self, *overrides: str) -> Config:
        """A run of its own."""
        self._runs += 1
        args = self.args
        return load_config(
            args.recipe,
            [
                f"run.url={self.url}/run{self._runs}", f"data.url={self.url}/data", f"model.channels={args.channels}",
                f"train.global_batch={args.batch}", f"train.max_micro_batch={args.batch}", "train.steps=10000000",
                f"precision={args.precision}", "zero.stage=1", f"cluster.workers={args.workers}",
                "cluster.gpus_per_worker=0", f"checkpoint.every_steps={args.steps}",
                "checkpoint.snapshot_every_steps=10000000",
                "logging.every_steps=10", "cluster.hang_seconds=36000", *overrides,
            ],
        )  # fmt: skip

    def side(self, train: Train, cfg: Config) -> Side:
        return Side(train, self.workers, self.cores, cfg, self.args.steps)

    def beside(self, name: str, other: Train) -> list[float]:
        """Ratios of our images/s to another side's, round by round."""
        ratios = []
        with self.side(ours, self.config()) as mine, self.side(other, self.config()) as theirs:
            mine.turn(), theirs.turn()  # what happens once: imports, caches, the first allocation of everything
            for number in range(self.args.rounds):
                order = (mine, theirs) if number % 2 == 0 else (theirs, mine)
                rates = {side: side.turn()["rate"] for side in order}
                ratios.append(rates[mine] / rates[theirs])
                _say(f"{self.workers} workers: ours {rates[mine]:.2f} images/s, {name} {rates[theirs]:.2f}", ratios[-1])
        return ratios


def bench_system(bench: Bench) -> Found:
    return {f"system_of_bare_{bench.workers}": statistics.median(bench.beside("bare", bare))}


def bench_diffusers(bench: Bench) -> Found:
    return {f"system_of_diffusers_{bench.workers}": statistics.median(bench.beside("diffusers", diffusers))}


def bench_save(bench: Bench) -> Found:
    """Both sides' step with a save over the median of their steps without one."""
    found: dict[str, list[float]] = {"ours": [], "deepspeed": []}
    with bench.side(ours, bench.config()) as mine, bench.side(engine_saving, bench.config()) as theirs:
        mine.turn(), theirs.turn()
        for _ in range(bench.args.rounds):
            for name, side in (("ours", mine), ("deepspeed", theirs)):
                turn = side.turn()
                median = statistics.median(turn["step_s"])
                with_save = [s for s, saving in zip(turn["step_s"], turn["saving"], strict=True) if saving]
                found[name] += [s / median for s in with_save]
                _say(f"{name}: median step {median:.3f} s, with a save {max(with_save):.3f} s", found[name][-1])
    return {
        "save_step_of_median": statistics.median(found["ours"]),
        "save_step_of_median_worst": max(found["ours"]),
        "deepspeed_save_step_of_median": statistics.median(found["deepspeed"]),
    }


def bench_ema(bench: Bench) -> Found:
    with bench.side(ours, bench.config()) as mine:
        mine.turn()
        shares = []
        for _ in range(bench.args.rounds):
            turn = mine.turn()
            shares.append(statistics.median(turn["ema_s"]) / statistics.median(turn["step_s"]))
            _say(f"an average {1000 * statistics.median(turn['ema_s']):.2f} ms", shares[-1])
    return {"ema_of_step": statistics.median(shares)}


PARTS: dict[str, Callable[[Bench], Found]] = {
    "system": bench_system,
    "diffusers": bench_diffusers,
    "save": bench_save,
    "ema": bench_ema,
    "copies": lambda bench: bench_copies(bench.config, bench.side, bench.args.rounds),
    "memory": lambda bench: bench_memory(bench.args.full_channels),
    "resume": lambda bench: bench_resume(bench.url, bench.cores[0]),
    "follow": lambda bench: bench_follow(bench.config, bench.cores, bench.args.steps, bench.args.rounds),
    "restart": lambda bench: bench_restart(bench.config, bench.server, bench.cores, bench.args.rounds),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    available = sorted(os.sched_getaffinity(0))
    cores = (available[:-1] or available) if args.workers == 1 else available
    os.sched_setaffinity(0, {available[-1]})  # this process and the servers that it starts
    folder = Path(tempfile.mkdtemp(prefix="ddpm-bench-training-"))
    found: Found = {}
    try:
        with S3Server(folder / "s3") as server:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                del os.environ[name]
            os.environ.update(server.env)
            storage.clear_instances()
            bench = Bench(args, server, cores)
            for part in args.parts or PARTS:
                print(f"-- {part}", flush=True)
                found |= PARTS[part](bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)


def _make_set(url: str, count: int) -> None:
    """Smooth random colour images of 32 px as PNG, in 8 shards."""
    coarse = np.random.default_rng(0).integers(40, 216, (count, 8, 8, 3), dtype=np.uint8)
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2)
    names = [f"{i:06d}" for i in range(count)]
    shards = []
    for start in range(0, count, count // 8):
        part = range(start, start + count // 8)
        samples = [EncodedSample(names[i], decode.encode_png(pixels[i]), "png") for i in part]
        shards.append(write_shard(url, f"shard-{start:06d}.tar", samples))
    write_index(url, shards)


def _say(text: str, ratio: float) -> None:
    print(f"{text}, ratio {ratio:.3f}", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=cli.positive, default=1)
    parser.add_argument("--rounds", type=cli.positive, default=5)
    parser.add_argument("--steps", type=cli.positive, default=50, help="of a turn, and between checkpoints")
    parser.add_argument("--batch", type=cli.positive, default=32, help="images in a step")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--full-channels", type=int, default=128, help="of the network in the part `memory`")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--recipe", default=str(ROOT / "configs/cifar10.yaml"), metavar="FILE")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is unknown; choose from {', '.join(PARTS)}")
    if "diffusers" in (args.parts or PARTS) and find_spec("accelerate") is None:
        parser.error("diffusers: its example needs accelerate; pip install --constraint constraints.txt -e '.[bench]'")
    return args


if __name__ == "__main__":
    cli.run(main)
