"""Which device a process computes on, and how exactly: decided once, by the configuration.

Never by what happens to be visible: a recipe for CPUs trains on the CPU of a machine with GPUs, also beside a job that
uses them, and one for GPUs says what it misses. Nothing else in the package asks whether CUDA is there.
"""

import gc
import importlib.util
import logging
import os
import shutil
import socket
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddpm_dist.errors import ConfigError

if TYPE_CHECKING:
    from ddpm_dist.config import ClusterConfig

log = logging.getLogger(__name__)

CUBLAS_WORKSPACE = ":4096:8"
"""What cuBLAS needs for the same sums in each run; it is read when CUDA starts."""
FREE_SHARE = 0.9
"""Of a GPU's memory, which a process that is given the whole of it finds free at its start."""


def check_training(cluster: "ClusterConfig") -> None:
    """ConfigError for a number of GPUs that a training process can't use: it computes on the CPU, or on one GPU."""
    if cluster.gpus_per_worker not in (0, 1):
        remedy = "NCCL takes no two processes on one GPU" if cluster.gpus_per_worker < 1 else "more would lie idle"
        raise ConfigError(
            f"cluster.gpus_per_worker: {cluster.gpus_per_worker:g}: a training process computes on one GPU (1) or on "
            f"the CPU (0), {remedy}; the number of processes is cluster.workers"
        )


def select(gpus: float, local_rank: int = 0) -> torch.device:
    """The device of a process that is given so many GPUs: the CPU for 0, else that of its rank on this node.

    A process that sees one GPU alone takes it, whatever its rank. Raises ConfigError where there are none or too few,
    and for more than one.
    """
    if not gpus:
        return torch.device("cpu")
    if gpus > 1:
        raise ConfigError(
            f"cluster.gpus_per_worker: {gpus:g}: a process computes on one GPU, more would lie idle; use 1 or a "
            "fraction, and more workers"
        )
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0 or (there > 1 and local_rank >= there):
        found = f"{there} GPUs" if there else _why_none()
        raise ConfigError(
            f"cluster.gpus_per_worker: {gpus:g}, but process {local_rank} on {socket.gethostname()} sees {found}; set "
            "cluster.gpus_per_worker=0 to compute on the CPU, or start as many processes as there are GPUs"
        )
    return torch.device("cuda", local_rank if there > 1 else 0)


def set_up(device: torch.device, cluster: "ClusterConfig") -> None:
    """Settles everything in this process that decides which kernels run; before CUDA or DeepSpeed has started.

    On a CPU: the number of threads, and GPUs are hidden from libraries that look for themselves. On CUDA: whether the
    same call gives the same bits each time (cluster.deterministic), the precision of float32 products (cluster.tf32),
    whether our own kernels compute (cluster.fused_kernels), and the memory that this process may take: its fraction, or
    all, once a killed predecessor has let go of it.
    """
    os.environ["DS_ACCELERATOR"] = device.type  # DeepSpeed settles on one when it is imported
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(threads(cluster))
        return
    if cluster.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(cluster.deterministic)
    torch.backends.cudnn.benchmark = False  # its choice of kernels would differ from process to process
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cluster.tf32
    torch.cuda.set_device(device)
    missing = why_no_triton() if cluster.fused_kernels else None
    _own["kernels"] = cluster.fused_kernels and missing is None
    if missing is not None:
        log.warning("noise and group norms take torch's many kernels (cluster.fused_kernels): %s", missing)
    if cluster.gpus_per_worker < 1:
        torch.cuda.set_per_process_memory_fraction(cluster.gpus_per_worker, device)
    else:
        await_memory(device, cluster.wait_seconds)


def await_memory(device: torch.device, patience_s: float) -> None:
    """Waits until the GPU is free: a process that was killed holds its memory for some seconds more.

    Says so at once; after `patience_s` it goes on beside whoever stays, with a warning.
    """
    deadline = time.monotonic() + patience_s
    said = False
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if free >= FREE_SHARE * total:
            return
        taken = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU {device.index}"
        if time.monotonic() >= deadline:
            log.warning(
                "%s are taken by others after %.0f s (cluster.wait_seconds); going on with the rest (nvidia-smi names "
                "them)", taken, patience_s,
            )  # fmt: skip
            return
        if not said:
            log.info(
                "%s are taken, by a process that is ending or another job; waiting up to %.0f s", taken, patience_s
            )
            said = True
        time.sleep(0.5)


def let_go(device: torch.device) -> None:
    """Gives back what torch keeps of a GPU's memory for later, also of recorded graphs that are gone."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what this process may still take: of what is free there, and of its own fraction."""
    let_go(device)
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    return max(0, int(min(free, own)))


def threads(cluster: "ClusterConfig") -> int:
    """Threads of torch in a process with a worker's share of CPUs."""
    return max(1, int(cluster.cpus_per_worker))


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What the bits of a GPU's results depend on beside its kind and torch; empty on a CPU."""
    if device.type == "cpu":
        return {}
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "kernels": f"triton {version('triton')}" if fused(device) else "torch",
    }


def fused(device: torch.device) -> bool:
    """Whether normal numbers and group norms are computed by the kernels of `ddpm_dist.kernels`: on CUDA, where Triton
    works and cluster.fused_kernels isn't off. Elsewhere it is torch's operations, one after the other."""
    return device.type == "cuda" and _own["kernels"]


def name(device: torch.device) -> str:
    """`cpu`, or the GPU's kind, such as `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def why_no_triton() -> str | None:
    """What this node lacks to build kernels for a GPU (torch.compile's and our own), with the remedy; None if nothing.

    Triton is a package beside torch, and compiles a small C module against Python's headers at its first use.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here; install torch for CUDA, which brings it"
    named = os.environ.get("CC")
    compilers = [named] if named else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        where = "CC in the environment" if named else "PATH"
        return f"Triton needs a C compiler, and {' or '.join(compilers)} ({where}) is not on this node; install gcc"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return f"Triton needs Python's headers, and {header} is not on this node; install python3-dev"
    return None


def _why_none() -> str:
    if torch.version.cuda is None:
        return f"no GPU (torch {torch.__version__} is a build for CPUs)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no GPU" + (f" (CUDA_VISIBLE_DEVICES={visible!r} in its environment)" if visible is not None else "")


_own = {"kernels": torch.version.cuda is not None and why_no_triton() is None}
"""Until `set_up` decides: whoever takes the network or the generator alone gets what works here."""
