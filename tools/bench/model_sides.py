"""The sides of tools/bench/model.py: networks with a training step each, and processes that take one when asked to."""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddpm_dist.allocator import keep_freed_memory
from ddpm_dist.config import ModelConfig
from ddpm_dist.models.unet import UNet, UNetConfig

LR, DECAY, CLIP = 2e-4, 0.9999, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Clock = Callable[[], float]
"""Seconds, of the clock on the wall or of the processor's time for this process."""


class Batch(NamedTuple):
    x: Tensor  # [B, 3, 32, 32], as are eps
    t: Tensor  # [B]
    eps: Tensor


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


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
