"""Processes that compute for the tests on a GPU: spawned, so that CUDA starts anew in each, and asked again and again.

A process costs its imports once, not in each test. One in which CUDA has failed answers nothing sensible any more: it
is ended, and the next question goes to a new one.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ddpm_dist.config import ClusterConfig
from ddpm_dist.engine import engine
from ddpm_dist.engine.world import World, init_world
from tools.local.s3_server import free_port

TIMEOUT_S = 58.0
"""A test on a GPU is to end within a minute."""
CPU_FACTOR = 10.0
"""A rehearsal on a CPU shares its cores, and compiles C++."""
BROKEN = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "AcceleratorError", "NCCL")


class Ranks:
    """`size` processes, the ranks of one world; called as `ranks(function, *arguments)`, for [each one's answer].

    function: of a test module, called as function(world, *arguments). device: cuda, or cpu for a rehearsal. cluster:
    settings beside the number of GPUs. environment: of the processes.
    """

    def __init__(self, device: str, size: int = 1, environment: dict[str, str] | None = None, **cluster: Any) -> None:
        self._size, self._environment = size, environment or {}
        self._cluster = ClusterConfig(gpus_per_worker=1 if device == "cuda" else 0, wait_seconds=0.1, **cluster)
        self._timeout_s = TIMEOUT_S * (CPU_FACTOR if device == "cpu" else 1)
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            answer: Any = f"no answer in {self._timeout_s:.0f} s"
            try:
                if pipe.poll(self._timeout_s):
                    answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                self._processes[rank].join(10)
                answer = f"it ended with exit code {self._processes[rank].exitcode}"
            if isinstance(answer, str):
                if self._size > 1 or not answer.startswith("Traceback") or any(word in answer for word in BROKEN):
                    self.close()
                raise AssertionError(f"rank {rank} of {self._size}:\n{answer}")
            answers.append(answer[0])
        return answers

    def close(self) -> None:
        """Ends the processes; the next call starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self._size)}
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            environment = {**self._environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_serve, args=(theirs, environment, self._cluster), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Any, environment: dict[str, str], cluster: ClusterConfig) -> None:
    os.environ.update(environment)
    world: World | None = None
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            world = world or _start(cluster)
            answer: Any = [_on_host(function(world, *arguments))]
        except BaseException:
            answer = traceback.format_exc()
        if world is not None and world.device.type == "cuda":
            torch.cuda.empty_cache()
        pipe.send_bytes(pickle.dumps(answer))


def _start(cluster: ClusterConfig) -> World:
    world = init_world(cluster)
    if world.device.type == "cpu":  # a rehearsal of fp16, which nobody would train with there
        from deepspeed.accelerator import get_accelerator

        engine.check = lambda cfg, world: None
        get_accelerator().is_fp16_supported = lambda: True
    return world


def _on_host(value: Any) -> Any:
    """Answers travel without the device that they were computed on."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(one) for one in value) if type(value) in (list, tuple) else value
    return value
