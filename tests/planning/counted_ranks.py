"""Two ranks over gloo that count what a training step sends: run by tests/planning/test_traffic.py."""

import multiprocessing
import os
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from ddpm_dist import snapshot
from ddpm_dist.config import Config
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import init_world
from ddpm_dist.recipe import load_config
from tools.local.s3_server import free_port

RANKS = 2


def counted(stage: int, precision: str, accumulation: int) -> tuple[list[int], dict[str, int]]:
    """(elements of each parameter, {collective: bytes of its largest tensor, added up}) of the second step."""
    context = multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    cfg = load_config(
        "digits",
        ["run.url=memory://run", "data.url=memory://data", f"zero.stage={stage}", f"precision={precision}"],
    )
    arguments = [(results, rank, port, cfg, accumulation) for rank in range(RANKS)]
    processes = [context.Process(target=_rank, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return max((results.get() for _ in processes), key=lambda found: sum(found[1].values()))


def _rank(results: Any, rank: int, port: int, cfg: Config, accumulation: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = init_world()
    sent = _watch()
    engine = Engine(snapshot.build(cfg)[0], cfg, world, 1, accumulation)
    x = torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    for _ in range(2):
        sent.clear()
        for _ in range(accumulation):
            engine.backward(engine(x, torch.zeros(1, dtype=torch.int64)).square().mean())
        engine.step(1e-4)
    results.put(([shape.numel() for shape in engine.shapes.values()], dict(sent)))


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
                flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
                each = [t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor)]
                whole = sum(each[:-1]) if _name == "all_gather" else max(each)
                sent[_name] += whole
            inside.append(_name)
            try:
                return _plain(*args, **kwargs)
            finally:
                inside.pop()

        setattr(dist, name, counting)
    return sent
