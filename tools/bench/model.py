"""The CIFAR-10 network, ours beside diffusers': speed of a training step and of inference, memory, share of the peak.

    python -m tools.bench.model                        # both precisions, all cores, batch 16
    python -m tools.bench.model --threads 1 --cpu-time           # beside others on the same machine
    python -m tools.bench.model --compile                        # ours through torch.compile as well (minutes more)

Same weights, batch, threads and handling of precision on both sides (bf16: bf16 weights and activations, float32
masters, as under DeepSpeed). Each has a process of its own; they take turns, so that what else the machine does hits
both; ratios are medians over the rounds. A training step is forward, loss, backward, gradient clipping, Adam and EMA:

  ours     torch's clipping over all tensors at once, fused Adam, one call for the EMA, and the allocator's settings,
           as in our engine
  theirs   diffusers' unconditional example: clip_grad_norm_, torch's default Adam, diffusers' EMAModel

The convolution peak is measured as well: torch's plain convolution in the given precision, forward and backward, on
every shape of the network at the same batch, each in its better memory layout, weighted by FLOPs. The share of it is
the network's convolution FLOPs (as the paper's network has them, whoever saves some) over the fastest step's time.
It exceeds what plain convolutions allow where ours needs fewer products, or takes faster ones (models/arithmetic.py).

The last line is one JSON object; ratios above 1 are in our favour (of compiled ones: in favour of compiling), memory
ratios below 1.
"""

import argparse
import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ddpm_dist import cli
from ddpm_dist.allocator import keep_freed_memory
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.arithmetic import SLOW_BF16
from tools.bench.model_peak import ConvShape, conv_seconds, conv_shapes
from tools.bench.model_sides import DTYPES, SIDES, Contender, clock_of

WARM_UP = 2


def alternate(contenders: dict[str, Contender], what: str, rounds: int) -> dict[str, list[Any]]:
    """What each side answers by turns, the first changing every round."""
    found: dict[str, list[Any]] = {name: [] for name in contenders}
    for r in range(-WARM_UP, rounds):
        for name in sorted(contenders, reverse=bool(r % 2)):
            value = contenders[name].ask(what)
            if r >= 0:
                found[name].append(value)
    return found


def ratio(found: dict[str, list[float]], ours: str = "ours", theirs: str = "theirs") -> float:
    """Median over the rounds of their time over ours."""
    return statistics.median(b / a for a, b in zip(found[ours], found[theirs], strict=True))


def measure(precision: str, args: argparse.Namespace, shapes: Counter[ConvShape]) -> dict[str, float]:
    """All figures of one precision, printed as a table."""
    contenders = {name: Contender(name, precision, args) for name in SIDES if name != "compiled" or args.compile}
    inference = alternate(contenders, "inference", args.rounds)
    both = alternate(contenders, "training", args.rounds)
    network, training = ({name: [pair[k] for pair in pairs] for name, pairs in both.items()} for k in range(2))
    memory = {name: contender.ask("peak") for name, contender in contenders.items()}
    for contender in contenders.values():
        contender.end()
    conv_forward, conv_both = conv_seconds(shapes, DTYPES[precision], args.batch, args.rounds, clock_of(args))

    gflop = sum(count * shape.flops(args.batch) for shape, count in shapes.items()) / 1e9
    print(f"\n{precision}: plain convolutions alone {gflop / conv_forward:.0f} GFLOP/s forward, "
          f"{3 * gflop / conv_both:.0f} forward and backward")  # fmt: skip
    print(f"{'':10}{'training':>12}{'':>14}{'inference':>14}{'peak':>12}{'share of conv peak':>22}")
    figures: dict[str, float] = {}
    for name in contenders:
        shares = conv_both / min(training[name]), conv_forward / min(inference[name])
        speeds = [args.batch / statistics.median(times[name]) for times in (training, network, inference)]
        print(f"{name:10}{speeds[0]:8.2f} img/s ({speeds[1]:.2f} without update){speeds[2]:8.2f} img/s"
              f"{memory[name] / 2**20:8.0f} MiB{shares[0]:10.1%} training, {shares[1]:.1%} inference")  # fmt: skip
        figures |= {f"{name}_training_images_per_s": speeds[0], f"{name}_inference_images_per_s": speeds[2],
                    f"{name}_training_conv_share": shares[0], f"{name}_inference_conv_share": shares[1],
                    f"{name}_peak_MiB": memory[name] / 2**20}  # fmt: skip
    figures |= {
        "training_ratio": ratio(training),
        "training_without_update_ratio": ratio(network),
        "inference_ratio": ratio(inference),
        "peak_memory_ratio": memory["ours"] / memory["theirs"],
    }
    print("ours / theirs: training {training_ratio:.3f} (without update {training_without_update_ratio:.3f}), "
          "inference {inference_ratio:.3f}, peak memory {peak_memory_ratio:.3f}".format_map(figures))  # fmt: skip
    if args.compile:
        gains = {f"compiled_{what}_ratio": ratio(times, "compiled", "ours")
                 for what, times in (("training", training), ("inference", inference))}  # fmt: skip
        print("compiled / ours: training {compiled_training_ratio:.3f}, inference {compiled_inference_ratio:.3f}"
              .format_map(gains))  # fmt: skip
        figures |= gains
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=cli.positive, default=16, help="images in a step")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count())
    parser.add_argument("--rounds", type=cli.positive, default=7)
    parser.add_argument("--compile", action="store_true", help="a third side: ours with model.compile")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's processor seconds: where others work as well"
    )
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        raise ConfigError(f"--threads: {args.threads} with --cpu-time, which would add up the threads' waiting; use 1")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, batch {args.batch}, "
          f"{args.rounds} rounds; bf16 products are {'slow' if SLOW_BF16 else 'fast'} here")  # fmt: skip
    shapes = conv_shapes()
    result: dict[str, Any] = {"batch": args.batch, "threads": args.threads}
    for precision in args.precision:
        figures = measure(precision, args, shapes)
        result |= {f"{precision}_{name}": round(value, 4) for name, value in figures.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
