"""Who this process is among the training processes, on which device, and small agreements between them.

The launchers (Ray Train, `deepspeed`, a plain `python`) differ only in what they leave in the environment;
after `init_world` nobody needs to know which one it was.
"""

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ddpm_dist import device as devices
from ddpm_dist.config import ClusterConfig
from ddpm_dist.engine import launchers
from ddpm_dist.engine.join import join
from ddpm_dist.errors import ClusterError

COLLECTIVE_TIMEOUT_S = 1800
"""Last resort of gloo and NCCL; the loop's watchdog finds a hang long before."""


@dataclass(frozen=True)
class World:
    """Who this process is among those that train together, and where it computes."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def init_world(cluster: ClusterConfig | None = None, patience_s: float = COLLECTIVE_TIMEOUT_S) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe, or what Open
    MPI, MPICH or SLURM left instead (launchers.py).

    Without any of them this is a world of one. A group that exists already (Ray Train's) is taken as it is. The device
    is what `cluster` (by default: one CPU) gives to a worker, and with it go the collectives: NCCL or gloo.
    patience_s: how long to wait for the others, here and in each collective.
    """
    cluster = cluster or ClusterConfig()
    if not dist.is_initialized():
        launchers.adopt()
    rank, size = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants to read it there, also in a world of one
    local_rank = _environment_int("LOCAL_RANK", 0)
    devices.check_training(cluster)
    device = devices.select(cluster.gpus_per_worker, local_rank)
    devices.set_up(device, cluster)
    if not dist.is_initialized():
        _init_process_group(rank, size, "nccl" if device.type == "cuda" else "gloo", patience_s)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, dist.get_backend())


def _init_process_group(rank: int, size: int, backend: str, patience_s: float) -> None:
    if size == 1:
        timeout = timedelta(seconds=patience_s)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ClusterError(f"WORLD_SIZE is {size}, but {' and '.join(missing)} is not set; start through launch/")
    use_interface_of(os.environ["MASTER_ADDR"])
    if not 0 <= rank < size:
        raise ClusterError(f"RANK is {rank} and WORLD_SIZE {size}; ranks go from 0 to {size - 1}")
    join(backend, rank, size, patience_s)


def use_interface_of(master: str) -> None:
    """Binds gloo and NCCL to the interface that holds this node's own address, as seen on the way to `master`.

    By itself gloo resolves the host's name, which often is 127.0.0.1, and then can't be reached by others.
    Interfaces may be named differently on each host, so every process decides for itself. What the user set stays.
    """
    interface = interface_of(own_address(master))
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def own_address(peer: str) -> str:
    """This node's IP address on the route to `peer`; no packet is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(f"MASTER_ADDR {peer}: no route from this node ({error.strerror or error})") from None


def interface_of(address: str) -> str | None:
    """Name of the network interface with an IP address; none for loopback, which needs no choice."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            is_ip = entry.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and ipaddress.ip_address(entry.address.partition("%")[0]) == wanted:
                return name
    return None


def broadcast_object(world: World, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(world: World, value: Any) -> list[Any]:
    """Every rank's value in the order of ranks, on every rank."""
    values: list[Any] = [value]
    if world.size > 1:
        values = [None] * world.size
        dist.all_gather_object(values, value)
    return values


def gather_tensor(world: World, tensor: Tensor) -> Tensor:
    """Every rank's tensor [n, …], end to end in the order of ranks: [n · W, …] on every rank, on the world's device."""
    tensor = tensor.detach().to(world.device).contiguous()
    if world.size == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(found, tensor)
    return torch.cat(found)


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ClusterError(f"{name}={text!r} in the environment is not a number") from None
