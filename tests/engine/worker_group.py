"""Real training processes for tests: gloo over loopback, forked from a server that has imported everything."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - 5 s of imports that every engine needs, done once
import torch
from torch import Tensor, nn

from ddpm_dist.config import Config
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World, init_world
from ddpm_dist.recipe import validate
from ddpm_dist.rng import normal
from tools.local.s3_server import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "ddpm_dist.training.entry", "s3fs"])
BATCH = 8
SIZE = 8


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """[function(world, *arguments) of each rank]; fails with the traceback of the first rank that fails."""
    results = start_ranks(function, size, *arguments, timeout_s=timeout_s)
    for rank, result in enumerate(results):
        if isinstance(result, str):
            raise AssertionError(f"rank {rank}:\n{result}")
    assert None not in results, f"rank {results.index(None)} died without a word"
    return [result[0] for result in results]


def start_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """For each rank: [its result], the text of its error, or None if it was killed."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        arguments_of_rank = (theirs, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments)
        process = _CONTEXT.Process(target=_main, args=arguments_of_rank, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: list[Any] = [None] * size
    open_pipes: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    try:
        while open_pipes:
            ready = wait(list(open_pipes), timeout_s)
            if not ready:
                raise AssertionError(f"ranks {sorted(open_pipes.values())} did not end in {timeout_s:.0f} s")
            died = False
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    died = True
            if died or any(isinstance(result, str) for result in results):
                break  # the others may wait for it: every launcher ends them, too
    finally:
        for process in processes:
            if open_pipes:
                process.kill()
            process.join()
    return results


def _main(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(environment)
    try:
        result: Any = [function(init_world(), *arguments)]
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        result = traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    os._exit(0)


class TinyNet(nn.Module):
    """As a U-Net in small: convolutions, norms, a time embedding; sizes that divide by nothing nice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Linear(6, 12)
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.middle = nn.Conv2d(12, 21, 3, padding=1)
        self.last = nn.Conv2d(21, 3, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        waves = torch.sin(0.01 * t[:, None].float() * torch.arange(1, 7, device=t.device))
        h = self.norm(self.first(x)) + self.embed(waves.to(x.dtype))[:, :, None, None]
        out: Tensor = self.last(nn.functional.silu(self.middle(nn.functional.silu(h))))
        return out


def config(url: str = "memory://run", stage: int = 1, precision: str = "fp32", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "run": {"url": url},
        "data": {"url": "memory://data", "image_size": SIZE},
        "model": {"channels": 32, "channel_mult": [1], "attention_resolutions": []},
        "train": {"steps": 100, "global_batch": BATCH, "lr": 1e-3, "warmup_steps": 0},
        "ema": {"decay": 0.9},
        "zero": {"stage": stage},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return validate({**values, "precision": precision}, "test")


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, target, t) of a step, the same in every process."""
    index = torch.arange(BATCH) + step * BATCH
    return normal(1, 1, index, (3, SIZE, SIZE)), normal(1, 2, index, (3, SIZE, SIZE)), 100 * torch.arange(BATCH)


def build(world: World, cfg: Config, accumulation: int = 1) -> Engine:
    return Engine(TinyNet(), cfg, world, BATCH // world.size // accumulation, accumulation)


def backward(engine: Engine, step: int, poison: float = 1.0, poisoned_rank: int = 0) -> None:
    """Backward passes over this rank's share of the global batch; `poison` multiplies a rank's first loss."""
    world = engine.world
    x, target, t = (tensor.to(world.device) for tensor in global_batch(step))
    share = BATCH // world.size
    micro = share // engine.accumulation
    for i in range(engine.accumulation):
        at = slice(world.rank * share + i * micro, world.rank * share + (i + 1) * micro)
        loss = (engine(x[at], t[at]) - target[at]).square().mean()
        engine.backward(loss * poison if i == 0 and world.rank == poisoned_rank else loss)


def tensors_of(engine: Engine) -> dict[tuple[str, int, str], Tensor]:
    """Copies of all that a rank owns: (name, offset, kind) -> tensor."""
    return {
        (piece.name, piece.offset, kind): getattr(piece, kind).cpu().clone()
        for piece in engine.pieces()
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }


def whole(world: World, engine: Engine, kind: str = "weights") -> dict[str, Tensor]:
    """Every parameter's tensor of a kind, gathered on every rank."""
    from ddpm_dist.engine.pieces import gather_full

    pieces = engine.pieces()
    tensors, addresses = [getattr(p, kind) for p in pieces], [p.address for p in pieces]
    return dict(gather_full(tensors, addresses, engine.shapes, world, everywhere=True))
