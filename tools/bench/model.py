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
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddpm_dist import cli
from ddpm_dist.allocator import keep_freed_memory
from ddpm_dist.config import ModelConfig
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.arithmetic import SLOW_BF16
from ddpm_dist.models.unet import UNet, UNetConfig

LR, DECAY, CLIP = 2e-4, 0.9999, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2


Clock = Callable[[], float]
"""Seconds, of the clock on the wall or of the processor's time for this process."""


class Batch(NamedTuple):
    x: Tensor  # [B, 3, 32, 32], as are eps
    t: Tensor  # [B]
    eps: Tensor


class ConvShape(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    size: int  # height and width of the input

    def flops(self, batch: int) -> int:
        """Of a forward pass: two per multiply-add."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return 2 * batch * self.inputs * self.outputs * self.kernel**2 * out**2


class Ours:
    """Our network and a training step with the parts that our engine uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.network = UNet(cifar10()).initialize(0).to(dtype)
        self.weights = list(self.network.parameters())
        self.masters = masters_of(self.weights)
        self.averages = [master.detach().clone() for master in self.masters]
        self.adam = torch.optim.Adam(self.masters, lr=LR, fused=True)

    def forward(self, batch: Batch) -> Tensor:
        return self.network(batch.x, batch.t)

    @torch.no_grad()
    def update(self) -> None:
        move_gradients(self.weights, self.masters)
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.adam.step()
        torch._foreach_lerp_(self.averages, [*self.masters], 1 - DECAY)
        if self.masters is not self.weights:
            torch._foreach_copy_([*self.weights], [*self.masters])
        self.adam.zero_grad()


class Compiled(Ours):
    """Ours with `model.compile`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.network.compile()


class Theirs:
    """diffusers' network and a training step as its unconditional example does it, with float32 masters."""

    def __init__(self, dtype: torch.dtype) -> None:
        settings = cifar10().to_diffusers()
        settings.pop("_class_name")
        self.network = UNet2DModel(**settings)
        self.network.load_state_dict(UNet(cifar10()).initialize(0).state_dict())
        self.network.to(dtype)
        self.weights = list(self.network.parameters())
        self.masters = masters_of(self.weights)
        self.adam = torch.optim.Adam(self.masters, lr=LR)
        self.ema = EMAModel(self.masters, decay=DECAY)

    def forward(self, batch: Batch) -> Tensor:
        return self.network(batch.x, batch.t).sample

    @torch.no_grad()
    def update(self) -> None:
        move_gradients(self.weights, self.masters)
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.adam.step()
        self.ema.step(self.masters)
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)
        self.adam.zero_grad()


def masters_of(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """The float32 copies that the optimizer works on, or the weights themselves."""
    if weights[0].dtype == torch.float32:
        return weights
    return [nn.Parameter(weight.detach().float()) for weight in weights]


def move_gradients(weights: list[nn.Parameter], masters: list[nn.Parameter]) -> None:
    """Hands each weight's gradient to its master, in float32; the same on both sides."""
    if masters is not weights:
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None, "a backward pass went before"
            master.grad, weight.grad = weight.grad.float(), None


Side = Ours | Theirs
SIDES: dict[str, type[Ours] | type[Theirs]] = {"ours": Ours, "theirs": Theirs, "compiled": Compiled}


def cifar10() -> UNetConfig:
    """The paper's network, without dropout, whose random numbers are not what is measured."""
    return UNetConfig.from_recipe(ModelConfig(), image_size=32, channels=3, learned_variance=False)


def make_batch(size: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(size, 3, 32, 32, generator=generator) for _ in range(2))
    return Batch(x.to(dtype), torch.randint(1000, (size,), generator=generator), eps)


def train_step(side: Side, batch: Batch, clock: Clock) -> tuple[float, float]:
    """Seconds of (forward, loss and backward; the whole step)."""
    start = clock()
    F.mse_loss(side.forward(batch).float(), batch.eps).backward()
    middle = clock()
    side.update()
    return middle - start, clock() - start


@torch.no_grad()
def inference_step(side: Side, batch: Batch, clock: Clock) -> float:
    """Seconds of a forward pass."""
    start = clock()
    side.forward(batch)
    return clock() - start


class Contender:
    """A process that trains one side, a step at a time, when it is asked to."""

    def __init__(self, name: str, precision: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, precision, args), daemon=True)
        self._process.start()

    def ask(self, what: str) -> Any:
        """inference, training: seconds, as of the functions above; peak: bytes above what the imports took."""
        self._pipe.send(what)
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("a process of the benchmark ended; its words are above") from None

    def end(self) -> None:
        self._pipe.send("end")
        self._process.join()


def _serve(pipe: Connection, name: str, precision: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if name != "theirs":
        keep_freed_memory()
    clock = clock_of(args)
    before = _status_bytes("VmRSS")
    side, batch = SIDES[name](DTYPES[precision]), make_batch(args.batch, DTYPES[precision])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of imports and initialisation
    while (what := pipe.recv()) != "end":
        if what == "inference":
            pipe.send(inference_step(side, batch, clock))
        elif what == "training":
            pipe.send(train_step(side, batch, clock))
        else:
            pipe.send(_status_bytes("VmHWM") - before)


def clock_of(args: argparse.Namespace) -> Clock:
    return time.process_time if args.cpu_time else time.perf_counter


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


def conv_shapes() -> Counter[ConvShape]:
    """The convolutions that UNet2DModel really runs for one image, and how often each."""
    shapes: Counter[ConvShape] = Counter()

    def record(conv: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        c: Any = conv
        shapes[ConvShape(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0],
                         inputs[0].shape[2])] += 1  # fmt: skip

    side = Theirs(torch.float32)
    for module in side.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    inference_step(side, make_batch(1, torch.float32), time.perf_counter)
    return shapes


def conv_seconds(
    shapes: Counter[ConvShape], dtype: torch.dtype, batch: int, rounds: int, clock: Clock
) -> tuple[float, float]:
    """Seconds of all the network's convolutions alone, each at its best: (forward, forward and backward)."""
    forward = backward = 0.0
    for shape, count in shapes.items():
        layouts = [_conv_times(shape, dtype, batch, layout, rounds, clock) for layout in LAYOUTS]
        forward += count * min(layout[0] for layout in layouts)
        backward += count * min(sum(layout) for layout in layouts)
    return forward, backward


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _conv_times(
    shape: ConvShape, dtype: torch.dtype, batch: int, layout: torch.memory_format, rounds: int, clock: Clock
) -> tuple[float, float]:
    x = torch.randn(batch, shape.inputs, shape.size, shape.size).to(dtype).to(memory_format=layout)
    weight = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel).to(dtype).to(memory_format=layout)
    bias = torch.zeros(shape.outputs, dtype=dtype)
    stride, padding = [shape.stride] * 2, [shape.padding] * 2
    gradient = torch.randn_like(F.conv2d(x, weight, bias, stride, padding))
    needed = [shape.inputs > 3, True, True]  # the image itself needs no gradient

    def forward() -> None:
        F.conv2d(x, weight, bias, stride, padding)

    def backward() -> None:
        torch.ops.aten.convolution_backward(
            gradient, x, weight, [shape.outputs], stride, padding, [1, 1], False, [0, 0], 1, needed
        )

    return _best(forward, rounds, clock), _best(backward, rounds, clock)


def _best(action: Callable[[], None], rounds: int, clock: Clock) -> float:
    seconds = []
    for _ in range(rounds):
        start = clock()
        action()
        seconds.append(clock() - start)
    return min(seconds)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


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
