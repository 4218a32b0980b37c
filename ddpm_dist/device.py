"""Which device a process computes on, and how exactly: decided once, by the configuration.

Never by what happens to be visible: a recipe for CPUs trains on the CPU of a machine with GPUs, also beside a job that
uses them, and one for GPUs says what it misses. Nothing else in the package asks whether CUDA is there.
"""

import os
import socket
from typing import Any

import torch

from ddpm_dist.config import ClusterConfig
from ddpm_dist.errors import ConfigError

CUBLAS_WORKSPACE = ":4096:8"
"""What cuBLAS needs for the same sums in each run; it is read when CUDA starts."""


def check_training(cluster: ClusterConfig) -> None:
    """ConfigError for a number of GPUs that a training process can't use: it computes on the CPU, or on one GPU."""
    if cluster.gpus_per_worker not in (0, 1):
        remedy = "NCCL takes no two processes on one GPU" if cluster.gpus_per_worker < 1 else "more would lie idle"
        raise ConfigError(
            f"cluster.gpus_per_worker: {cluster.gpus_per_worker:g}: a training process computes on one GPU (1) or on "
            f"the CPU (0), {remedy}; the number of processes is cluster.workers"
        )


def select(gpus: float, local_rank: int = 0) -> torch.device:
    """The device of a process that is given so many GPUs: the CPU for 0, else that of its rank on this node.

    A process that sees one GPU alone takes it, whatever its rank. Raises ConfigError where there are none or too few.
    """
    if not gpus:
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0 or (there > 1 and local_rank >= there):
        found = f"{there} GPUs" if there else _why_none()
        raise ConfigError(
            f"cluster.gpus_per_worker: {gpus:g}, but process {local_rank} on {socket.gethostname()} sees {found}; set "
            "cluster.gpus_per_worker=0 to compute on the CPU, or start as many processes as there are GPUs"
        )
    return torch.device("cuda", local_rank if there > 1 else 0)


def set_up(device: torch.device, cluster: ClusterConfig) -> None:
    """Settles everything in this process that decides which kernels run; before CUDA or DeepSpeed has started.

    On a CPU: the number of threads, and GPUs are hidden from libraries that look for themselves. On CUDA: whether the
    same call gives the same bits each time (cluster.deterministic), and the precision of float32 products
    (cluster.tf32).
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


def threads(cluster: ClusterConfig) -> int:
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
    }


def name(device: torch.device) -> str:
    """`cpu`, or the GPU's kind, such as `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _why_none() -> str:
    if torch.version.cuda is None:
        return f"no GPU (torch {torch.__version__} is a build for CPUs)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no GPU" + (f" (CUDA_VISIBLE_DEVICES={visible!r} in its environment)" if visible is not None else "")
