"""Memory of a rank by ZeRO stage, and time to resume by size of the state: parts of tools/bench/training.py."""

import gc
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_dist import snapshot
from ddpm_dist.config import Config
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World, init_world
from ddpm_dist.planning.memory import bytes_between_steps
from ddpm_dist.recipe import load_config
from ddpm_dist.state.store import StateStore
from ddpm_dist.training.ema import Ema
from tools.local.s3_server import free_port

RECIPE = Path(__file__).resolve().parents[2] / "configs/cifar10.yaml"
MIB = 2**20
RANKS = 2
SIZES = (32, 64, 128)
"""Channels of the networks whose states are read: 2.2M, 8.9M and 35.7M parameters."""


def bench_memory(channels: int) -> dict[str, float]:
    """The largest rank's bytes of tensors after a step, over the formula, for each stage and precision."""
    found = {}
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3))):
        for stage in stages:
            cfg = _config("memory://run", channels, f"zero.stage={stage}", f"precision={precision}")
            held = _in_processes(_held, RANKS, cfg)
            numels = held[0][0]
            formula = bytes_between_steps(numels, stage, precision, RANKS)
            measured = max(tensors for _, tensors in held)
            found[f"memory_of_formula_zero{stage}_{precision}"] = measured / formula
            print(
                f"ZeRO-{stage} {precision}, {RANKS} ranks, {sum(numels) / 1e6:.1f}M parameters: {measured / MIB:.0f} "
                f"MiB of tensors in a rank, formula {formula / MIB:.0f}, ratio {measured / formula:.3f}",
                flush=True,
            )
    return found


def bench_resume(url: str, core: int) -> dict[str, float]:
    """Seconds from the claim to the last tensor in place, by MB of the state."""
    found = {}
    for channels in SIZES:
        cfg = _config(f"{url}/resume{channels}", channels)
        _in_processes(_saved, 1, cfg, core)
        seconds, size = _in_processes(_loaded, 1, cfg, core)[0]
        found[f"resume_seconds_{size / 1e6:.0f}MB"] = seconds
        print(f"a state of {size / 1e6:.0f} MB: claimed and read in {seconds:.2f} s", flush=True)
    return found


# In the ranks


def _held(world: World, cfg: Config) -> tuple[list[int], int]:
    """(elements of each parameter, bytes of all tensors that this rank holds after a step)."""
    engine, ema = _build(world, cfg)
    size = (1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    engine.backward(engine(torch.zeros(size), torch.zeros(1, dtype=torch.int64)).square().mean())
    engine.step(1e-4)
    ema.update(0, 1)
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would wake up torch's lazy modules
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return [shape.numel() for shape in engine.shapes.values()], sum(storages.values())


def _saved(world: World, cfg: Config) -> None:
    engine, ema = _build(world, cfg)
    store = StateStore(cfg, world)
    store.claim()
    store.save(1, engine, ema, {"step": 1})
    store.finish()


def _loaded(world: World, cfg: Config) -> tuple[float, int]:
    engine, ema = _build(world, cfg)
    store = StateStore(cfg, world)
    start = time.perf_counter()
    state = store.claim()
    assert state is not None
    store.load(state, engine, ema)
    return time.perf_counter() - start, store.bytes_read


def _build(world: World, cfg: Config) -> tuple[Engine, Ema]:
    engine = Engine(snapshot.build(cfg)[0], cfg, world, 1, 1)
    return engine, Ema(engine.pieces(), cfg)


def _in_processes(function: Any, size: int, cfg: Config, core: int | None = None) -> Sequence[Any]:
    """function(world, cfg) of each rank."""
    context = multiprocessing.get_context("spawn")
    results, port, processes = context.SimpleQueue(), free_port(), []
    for rank in range(size):
        processes.append(context.Process(target=_rank, args=(results, function, rank, size, port, cfg, core)))
        processes[-1].start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process of the benchmark ended with {process.exitcode}; its words are above")
    return [results.get() for _ in processes]


def _rank(results: Any, function: Any, rank: int, size: int, port: int, cfg: Config, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    results.put(function(init_world(), cfg))


def _config(url: str, channels: int, *overrides: str) -> Config:
    batch = [
        f"train.global_batch={RANKS}",
        "cluster.workers=1",
        "cluster.gpus_per_worker=0",
        f"model.channels={channels}",
    ]
    return load_config(RECIPE, [f"run.url={url}", "data.url=memory://data", *batch, *overrides])
