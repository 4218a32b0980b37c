"""Parts of tools/bench/gpu.py about training steps: now, ceilings, training, zero, determinism, memory."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ddpm_dist.config import ClusterConfig
from ddpm_dist.device import set_up
from ddpm_dist.training.flops import training_flops_per_image
from tools.bench.gpu_network import Diffusers, OneGraph, Ours, has_diffusers, recipe
from tools.bench.gpu_sides import Process, Setting, alternate, apart, ratio, seconds_of

Row = dict[str, Any]


def ceilings(setting: Setting) -> Iterator[Row]:
    """What the card does at most: a copy between two places of its memory, and large products in bf16 and float32."""
    yield from apart(_ceilings, setting)


def _ceilings(setting: Setting) -> Iterator[Row]:
    device = torch.device(setting.device)
    set_up(device, ClusterConfig(gpus_per_worker=1 if setting.on_cuda else 0, wait_seconds=1))
    numel = 1 << (30 if not setting.small else 20)
    source = torch.empty(numel, dtype=torch.bfloat16, device=device).normal_()
    seconds = seconds_of(partial(torch.empty_like(source).copy_, source), setting.device, setting.times(20))
    yield {"what": "copy, bytes read and written", "value": 2 * 2 * numel / seconds / 1e12, "unit": "TB/s"}
    del source
    for dtype in (torch.bfloat16, torch.float32):
        size = 8192 if not setting.small else 128
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, a, b), setting.device, setting.times(20))
        name = str(dtype).removeprefix("torch.")
        yield {"what": f"product {size}³, {name}", "value": 2 * size**3 / seconds / 1e12, "unit": "TFLOP/s"}
    for channels, side in ((128, 32), (256, 16)):
        batch = 512 if not setting.small else 2
        x = torch.randn(batch, channels, side, side, device=device).to(torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(torch.bfloat16)
        weight = weight.contiguous(memory_format=torch.channels_last)
        product = partial(torch.conv2d, x, weight, padding=1)
        seconds = seconds_of(product, setting.device, setting.times(20))
        tflops = 2 * batch * channels**2 * 9 * side**2 / seconds / 1e12
        yield {"what": f"convolution 3×3, {channels} channels, {side}², bf16", "value": tflops, "unit": "TFLOP/s"}


def sides_of(setting: Setting, batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """All sides of a training step, the most telling first. Compiled and channels last, ours is cifar10-fast's."""
    last = "model.channels_last=true"
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {"ours": (Ours, (batch,))}
    if setting.compiles:
        found["ours compiled, channels last"] = (Ours, (batch, last, "model.compile=true"))
    if has_diffusers():
        if setting.compiles:
            found["diffusers compiled, channels last"] = (Diffusers, (batch, True))
        found["diffusers"] = (Diffusers, (batch, False))
    found["ours channels last"] = (Ours, (batch, last))
    found["ours channels last in one graph"] = (OneGraph, (batch, True))
    if setting.compiles:
        found["ours compiled"] = (Ours, (batch, "model.compile=true"))
    found["ours without our kernels"] = (Ours, (batch, "cluster.fused_kernels=false"))
    return found


def now(setting: Setting) -> Iterator[Row]:
    """How things stand: the card's ceilings, and training at 128 and 512 images, ours beside diffusers compiled."""
    yield from ceilings(setting)
    wanted = ("ours", "ours compiled, channels last", "diffusers compiled, channels last")
    if not setting.compiles:
        wanted = ("ours", "ours channels last", "diffusers")
    for batch in setting.batches(128, 512):
        yield from _training(setting, batch, wanted)


def training(setting: Setting) -> Iterator[Row]:
    """Every side at 128, 512, 256, 64 and 16 images."""
    for batch in setting.batches(128, 512, 256, 64, 16):
        yield from _training(setting, batch, tuple(sides_of(setting, batch)))


def _training(setting: Setting, batch: int, wanted: tuple[str, ...]) -> Iterator[Row]:
    sides = {name: side for name, side in sides_of(setting, batch).items() if name in wanted}
    processes: dict[str, Process] = {}
    flops = training_flops_per_image(recipe(setting, batch))
    try:
        for name, (make, arguments) in sides.items():
            if setting.out_of_time:
                yield {"side": name, "images": batch, "left out": "no time left"}
                continue
            processes[name] = Process(make, setting, *arguments)
        made = {}
        for name in list(processes):
            try:
                made[name] = processes[name].ready()
            except RuntimeError as error:
                yield {"side": name, "images": batch, "left out": str(error)}
                processes.pop(name).__exit__()
        steps = max(2, min(20, 4096 // batch)) if not setting.small else 1
        found = alternate(processes, steps, setting.times(7))
        for name, process in processes.items():
            seconds = statistics.median(found[name])
            row: Row = {"side": name, "images": batch, "images/s": batch / seconds, "ms": 1e3 * seconds}
            row["TFLOP/s"] = flops * batch / seconds / 1e12
            row |= {key: round(value, 3) for key, value in process.ask("profiled").items()}
            row["peak GiB"], row["first steps s"] = process.ask("memory") / 2**30, made[name]
            for theirs in ("diffusers compiled, channels last", "diffusers"):
                if name.startswith("ours") and theirs in found:
                    row[f"× {theirs.partition(',')[0]}"] = ratio(found, name, theirs)
            yield row
    finally:
        for process in processes.values():
            process.__exit__()


def _one_by_one(setting: Setting, sides: dict[str, tuple[Any, ...]], batch: int) -> Iterator[Row]:
    """Rows of sides of `Ours`, by turns; the first one is what the others are compared with."""
    processes = {name: Process(Ours, setting, *arguments) for name, arguments in sides.items()}
    try:
        for name in list(processes):
            try:
                processes[name].ready()
            except RuntimeError as error:
                yield {"side": name, "images": batch, "left out": str(error)}
                processes.pop(name).__exit__()
        found = alternate(processes, max(2, min(20, 4096 // batch)) if not setting.small else 1, setting.times(7))
        base = next(iter(found), "")
        for name, process in processes.items():
            seconds = statistics.median(found[name])
            row = {"side": name, "images": batch, "images/s": batch / seconds, "ms": 1e3 * seconds}
            row |= {key: round(value, 3) for key, value in process.ask("profiled").items()}
            yield {**row, "peak GiB": process.ask("memory") / 2**30, f"× {base}": ratio(found, name, base)}
    finally:
        for process in processes.values():
            process.__exit__()


def zero(setting: Setting) -> Iterator[Row]:
    """ZeRO 0 to 3 on one GPU: what each stage's bookkeeping costs."""
    modes = {"ZeRO-1 bf16": ("zero.stage=1",), "ZeRO-2 bf16": ("zero.stage=2",), "ZeRO-3 bf16": ("zero.stage=3",),
             "ZeRO-0 fp32": ("zero.stage=0", "precision=fp32"), "ZeRO-1 fp32": ("precision=fp32",)}  # fmt: skip
    for batch in setting.batches(128):
        yield from _one_by_one(setting, {name: (batch, *changes) for name, changes in modes.items()}, batch)


def determinism(setting: Setting) -> Iterator[Row]:
    """The price of the same bits each time, and of float32 without TF32."""
    for batch in setting.batches(128, 512):
        off = "cluster.deterministic=false"
        sides: dict[str, tuple[Any, ...]] = {"not deterministic": (batch, off), "deterministic": (batch,)}
        last = "model.channels_last=true"
        sides |= {"channels last, not deterministic": (batch, last, off), "channels last, deterministic": (batch, last)}
        if batch == setting.batches(128)[0]:
            sides |= {"fp32": (batch, "precision=fp32"), "fp32 as TF32": (batch, "precision=fp32", "cluster.tf32=true")}
        yield from _one_by_one(setting, sides, batch)


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory of a training step."""
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("ZeRO-1 bf16", ()), ("level 0 recomputed", ("model.checkpoint_levels=[0]",)),
        ("channels last", ("model.channels_last=true",)), ("ZeRO-3 bf16", ("zero.stage=3",)),
        ("fp32", ("precision=fp32",)),
    ]  # fmt: skip
    for batch in setting.batches(128, 512):
        for name, changes in cases:
            if setting.out_of_time:
                yield {"side": name, "images": batch, "left out": "no time left"}
                continue
            with Process(Ours, setting, batch, *changes) as process:
                try:
                    process.ready()
                    process.ask("seconds", 2)
                    peak = process.ask("memory") / 2**30
                    yield {"side": name, "images": batch, "peak GiB": peak, "MiB an image": 1024 * peak / batch}
                except RuntimeError as error:
                    yield {"side": name, "images": batch, "left out": str(error)}
