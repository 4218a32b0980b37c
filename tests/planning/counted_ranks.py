"""Two ranks over gloo that count what a training step sends: run by tests/planning/test_traffic.py."""

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ddpm_dist import snapshot
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import init_world
from ddpm_dist.recipe import load_config
from tools.local.s3_server import free_port

RANKS = 2


Case = tuple[int, str, int]
"""ZeRO stage, precision, accumulation."""


def counted(cases: Sequence[Case]) -> list[tuple[list[int], dict[str, int]]]:
    """Of each case's second step: (elements of each parameter, {collective: bytes of its whole tensors})."""
    context = multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=_rank, args=(results, rank, port, cases)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found: list[tuple[list[int], dict[str, int]]] = results.get()
    return found


def _rank(results: Any, rank: int, port: int, cases: Sequence[Case]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = init_world()
    sent = _watch()
    found = []
    for stage, precision, accumulation in cases:
        urls = ["run.url=memory://run", "data.url=memory://data"]
        cfg = load_config("digits", [*urls, f"zero.stage={stage}", f"precision={precision}"])
        engine = Engine(snapshot.build(cfg)[0], cfg, world, 1, accumulation)
        x = torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
        for _ in range(2):
            sent.clear()
            for _ in range(accumulation):
                engine.backward(engine(x, torch.zeros(1, dtype=torch.int64)).square().mean())
            engine.step(1e-4)
        found.append(([shape.numel() for shape in engine.shapes.values()], dict(sent)))
    if rank == 0:
        results.put(found)


def _watch() -> dict[str, int]:
    """Counts the bytes of torch's collectives from now on, before DeepSpeed takes hold of them."""
    sent: dict[str, int] = defaultdict(int)
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter", "reduce",
             "broadcast", "all_to_all_single", "_all_gather_base", "_reduce_scatter_base")  # fmt: skip
    inside = []
    for name in names:
        plain = getattr(dist, name)

        def counting(*args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            if not inside:
                given = [*args, *kwargs.values()]
                lists = [sum(t.nbytes for t in a) for a in given if isinstance(a, list)]
                sent[_name] += max([*lists, *(t.nbytes for t in given if isinstance(t, torch.Tensor))])
            inside.append(_name)
            try:
                return _plain(*args, **kwargs)
            finally:
                inside.pop()

        setattr(dist, name, counting)
    return sent
