"""What tools/bench/sampling.py measures a job beside: processes that only run network and sampler."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from ddpm_dist import snapshot
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.samplers import sample


class Loops:
    """Processes that only run network and sampler, all at once."""

    def __init__(self, snapshot_url: str, settings: SamplingConfig, shape: tuple[int, int, int], count: int) -> None:
        assert settings.batch_size is not None
        context = multiprocessing.get_context("spawn")
        self._count, self._batch = count, settings.batch_size
        self._pipes, self._processes = [], []
        for number in range(count):
            mine, theirs = context.Pipe()
            arguments = (theirs, number, snapshot_url, settings.model_dump_json(), shape)
            self._processes.append(context.Process(target=_loop, args=arguments, daemon=True))
            self._pipes.append(mine)

    def __enter__(self) -> "Loops":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()

    def run(self, images: int) -> float:
        """Images/s of all together; each draws its share of whole batches."""
        batches = max(1, images // self._batch // self._count)

        def draw() -> None:
            for pipe in self._pipes:
                pipe.send(batches)
            for pipe in self._pipes:
                pipe.recv()

        return images_per_s(batches * self._batch * self._count, draw)


def _loop(pipe: Any, number: int, url: str, settings_json: str, shape: tuple[int, int, int]) -> None:
    torch.set_num_threads(1)
    settings = SamplingConfig.model_validate_json(settings_json)
    network, diffusion = snapshot.load_snapshot(url)
    network.requires_grad_(False)
    assert settings.batch_size is not None
    while True:
        for batch in range(pipe.recv()):
            indices = torch.arange(settings.batch_size) + (1000 * number + batch) * settings.batch_size
            sample(network, diffusion, settings, seed=0, indices=indices, shape=shape)
        pipe.send("done")


def images_per_s(images: int, action: Callable[[], object]) -> float:
    """How fast an action made so many images."""
    start = time.perf_counter()
    action()
    return images / (time.perf_counter() - start)
