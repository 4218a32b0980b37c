"""What a node has to have for what the configuration asks of it, looked at before the first step.

Only where it is needed: a compiler for torch.compile, shared memory for NCCL between processes of one node, memory that
may be locked for NCCL over InfiniBand.
"""

import logging
import os
import resource
import shutil
from pathlib import Path

from ddpm_dist import device as devices
from ddpm_dist.config import Config
from ddpm_dist.engine.world import World
from ddpm_dist.errors import ConfigError

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")  # noqa: S108 - where NCCL puts it
INFINIBAND = Path("/sys/class/infiniband")
SHM_BYTES = 2**30
"""NCCL takes some 10 to 40 MB there for each pair of processes of a node; containers have 64 MB by default."""


def check(cfg: Config, world: World) -> None:
    """Raises ConfigError for what this machine can't do; warns of what ends in a crash later."""
    on_cuda = world.device.type == "cuda"
    if cfg.precision == "fp16" and not on_cuda:
        raise ConfigError("precision: fp16 needs CUDA (cluster.gpus_per_worker=1); use bf16")
    if cfg.model.compile:
        missing = devices.why_no_triton() if on_cuda else _why_no_cxx()
        if missing is not None:
            raise ConfigError(f"model.compile: {missing} on every node, or set model.compile=false")
    if on_cuda and world.size > 1:
        for warning in (_about_shm(_processes_here(world)), _about_memlock(_processes_here(world) < world.size)):
            if warning is not None:
                log.warning("%s", warning)


def _why_no_cxx() -> str | None:
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} is not on this node; install it"
    return None


def _processes_here(world: World) -> int:
    """Of those that train together, the ones on this node, as far as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)


def _about_shm(processes: int) -> str | None:
    if processes < 2 or not SHM.is_dir():
        return None
    there = shutil.disk_usage(SHM)
    if there.free >= SHM_BYTES:
        return None
    return (
        f"{SHM} has {there.free / 2**20:.0f} of {there.total / 2**20:.0f} MiB free, and NCCL passes data between the "
        f"{processes} processes of this node through it: they may end with SIGBUS or 'No space left on device'; start "
        "the container with --shm-size=8g, or --ipc=host (Kubernetes: an emptyDir with medium: Memory)"
    )


def _about_memlock(several_nodes: bool) -> str | None:
    if not several_nodes or not INFINIBAND.is_dir() or not any(INFINIBAND.iterdir()):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return None
    return (
        f"a process may lock {limit / 2**10:.0f} KiB of memory here (ulimit -l), and NCCL registers its buffers with "
        "InfiniBand: it may fail with 'ibv_reg_mr failed'; start the container with --ulimit memlock=-1 (systemd: "
        "LimitMEMLOCK=infinity)"
    )
