"""Checks of a node's GPUs, and of the room that a rank finds there, or in the node's memory."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from ddpm_dist.doctor.machine import amount, available_memory
from ddpm_dist.doctor.rows import Asked, Check, Failed, Skipped, check
from ddpm_dist.planning import count, memory_of
from ddpm_dist.training import BatchPlan

MIB, GIB = 2**20, 2**30
PATIENCE_S = 60
IMPORTS_BYTES = 0.5 * GIB
"""Of a training process before it holds a tensor: torch, DeepSpeed, and Ray's worker beside it."""
_GPU = "index,name,driver_version,memory.total,memory.used"
_TORCH = (
    "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, "
    "torch.cuda.device_count() if torch.cuda.is_available() else 0]))"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    index: int
    name: str
    driver: str
    total: int
    used: int
    """Bytes."""


def gpus_here() -> list[Gpu]:
    """What nvidia-smi lists; none where there is none. Raises Failed where the driver doesn't answer."""
    lines = _ask_driver(f"--query-gpu={_GPU}")
    found = []
    for line in lines:
        index, name, driver, total, used = (part.strip() for part in line.split(","))
        found.append(Gpu(int(index), name, driver, int(total) * MIB, int(used) * MIB))
    return found


@check("GPUs", "install the driver and torch for CUDA on this node (docs/gpus.md), or set cluster.gpus_per_worker=0")
def gpus(asked: Asked) -> str:
    """As many GPUs as workers, which torch can use."""
    if not asked.wants_gpus:
        raise Skipped("the configuration computes on CPUs" if asked.cfg else "no --config")
    there = gpus_here()
    version, cuda, usable = _torch_sees()
    if not there:
        raise Failed(f"none here, and cluster.gpus_per_worker is {asked.config.cluster.gpus_per_worker:g}")
    text = f"{len(there)} × {', '.join(sorted({gpu.name for gpu in there}))}, driver {there[0].driver}"
    if not cuda:
        raise Failed(f"{text}; torch {version} is a build for CPUs")
    if usable < len(there):
        raise Failed(f"{text}; torch {version} (CUDA {cuda}) can use {usable}: the driver is too old for it, or busy")
    if asked.ranks_here > usable:
        raise Failed(f"{text}; {asked.ranks_here} workers come to this node", "fewer cluster.workers, or more nodes")
    return f"{text}, torch {version}"


@check("others on the GPUs", "wait for them, or end them if they are left over: nvidia-smi names them")
def neighbours(asked: Asked) -> str:
    """Processes that compute on this node's GPUs."""
    if not asked.wants_gpus:
        raise Skipped("no GPU is wanted here")
    lines = _ask_driver("--query-compute-apps=pid,used_memory")
    if lines:
        named = ", ".join(f"process {line.split(',')[0]} ({line.split(',')[1].strip()} MiB)" for line in lines[:4])
        raise Failed(f"{len(lines)}: {named}")
    return "nobody"


@check("room", "a smaller train.max_micro_batch, model.checkpoint_levels=[0], zero.stage=2 or 3, or more workers")
def room(asked: Asked) -> str:
    """The planner's estimate of a rank's memory beside what is free."""
    cfg = asked.config
    if not asked.works:
        raise Skipped("no worker comes to this node")
    on_gpu, world = cfg.cluster.gpus_per_worker > 0, cfg.worker_range[0]
    plan = BatchPlan.of(cfg.train.global_batch, world, cfg.train.max_micro_batch)
    needed = memory_of(
        count(cfg), cfg.zero.stage, cfg.precision, world, plan.micro_batch,
        averages=1 + len(cfg.ema.power), offload=cfg.zero.offload_optimizer, on_gpu=on_gpu,
    ).total  # fmt: skip
    text = f"a rank needs about {amount(needed)} (micro-batch {plan.micro_batch}, ZeRO-{cfg.zero.stage})"
    if on_gpu:
        there = gpus_here()
        if not there:
            raise Skipped(f"{text}; there is no GPU")
        free = min(gpu.total - gpu.used for gpu in there)
        if needed > free:
            raise Failed(f"{text}, and {amount(free)} are free on a GPU here")
        return f"{text}; {amount(free)} are free"
    needed_here, free = asked.ranks_here * (needed + IMPORTS_BYTES), available_memory()
    text += f"; {asked.ranks_here} of them {amount(needed_here)}"
    if needed_here > free:
        raise Failed(f"{text}, and {amount(free)} of memory are free here")
    return f"{text}; {amount(free)} are free"


def _ask_driver(query: str) -> list[str]:
    """nvidia-smi's lines; none where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise Failed(f"nvidia-smi: {said}", "reload the driver, or restart the node; its kernel log says why")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _torch_sees() -> tuple[str, str | None, int]:
    """(torch's version, its CUDA's, GPUs that it can use), asked in a process that sees all GPUs and ends."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _TORCH], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    if done.returncode:
        raise Failed(f"torch doesn't start here: {done.stderr.strip().splitlines()[-1]}")
    version, cuda, usable = json.loads(done.stdout.splitlines()[-1])
    return version, cuda, usable


CHECKS: tuple[Check[Asked], ...] = (gpus, neighbours, room)
