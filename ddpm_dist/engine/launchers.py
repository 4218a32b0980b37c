"""What a launcher left in the environment about this process: torchrun and DeepSpeed, Open MPI and its kin, SLURM.

torch reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Where a launcher says the same under other names,
`adopt` gives it these; a process that is one of many must never take itself for alone, or many trainings begin in one
folder.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ddpm_dist.errors import ClusterError

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORT_BASE = 29500
PORTS = 1000
"""A job's port is drawn from so many by its number, so that two jobs on one node seldom meet."""


@dataclass(frozen=True)
class _Launcher:
    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None = None

    def says(self, environment: Mapping[str, str]) -> tuple[str, str] | None:
        """(rank, size) of a process that is one of several; None of others."""
        rank, size = environment.get(self.rank), environment.get(self.size)
        return (rank, size) if rank is not None and size is not None and int(size) > 1 else None


_LAUNCHERS = (
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("SLURM's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""The innermost first: mpirun in a job of SLURM's is told from srun, which starts mpirun's own processes there."""


def adopt() -> None:
    """Sets what torch reads from what another launcher says, unless it is set. ClusterError if that isn't enough.

    A SLURM batch script's own process, which srun didn't start, is alone.
    """
    os.environ.update(translated(os.environ))


def check_single(command: str) -> None:
    """ClusterError where a launcher starts many of a command that is to be started once, and starts its workers itself.

    A Ray job's driver is one, whatever its node's Ray was started by.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    size = launched()
    if size != 1:
        raise ClusterError(
            f"a launcher starts {size} of {command} (WORLD_SIZE, or what Open MPI or SLURM left in the environment), "
            f"which is started once and starts its workers itself; start one, or as many of {command}-deepspeed"
        )


def launched() -> int:
    """How many processes a launcher started, by what it left in the environment; 1 where nobody did."""
    said = {**os.environ, **translated(os.environ)}.get("WORLD_SIZE") or "1"
    if not said.isdecimal():
        raise ClusterError(f"WORLD_SIZE={said!r} in the environment is not a number")
    return int(said)


def translated(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to an environment; none where torch's own are there, or where nobody launched."""
    if environment.get("WORLD_SIZE") or environment.get("RANK"):
        return {}
    for launcher in _LAUNCHERS:
        if found := launcher.says(environment):
            rank, size = found
            # srun says what PMI says as well (--mpi=pmi2), and alone knows the place on the node.
            alike = [other.local_rank for other in _LAUNCHERS if other.says(environment) == found]
            local = next((environment[name] for name in alike if name in environment), None)
            if local is None:
                said = _said(launcher, rank, size)
                raise ClusterError(f"{said} not which one on its node: set LOCAL_RANK, or start by torchrun")
            added = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local}
            return added | _master(environment, launcher, rank, size)
    return {}


def _master(environment: Mapping[str, str], launcher: _Launcher, rank: str, size: str) -> dict[str, str]:
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    if address is None and launcher.local_size and environment.get(launcher.local_size) == size:
        address = "127.0.0.1"  # all on this machine
    if address is None:
        raise ClusterError(
            f"{_said(launcher, rank, size)} not where rank 0 is: set MASTER_ADDR to its address, and MASTER_PORT, for "
            "all (mpirun -x MASTER_ADDR=… -x MASTER_PORT=…)"
        )
    job = environment.get("SLURM_JOB_ID", "0")
    port = environment.get("MASTER_PORT") or str(PORT_BASE + int(job) % PORTS)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _said(launcher: _Launcher, rank: str, size: str) -> str:
    return f"{launcher.name} says that this is process {rank} of {size} ({launcher.rank}, {launcher.size}), but"


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first node of SLURM's step or job: of "gpu[03-05,9],b" it is gpu03."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    found = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodes)
    return None if found is None else found[1] + (found[2] or "") + (found[3] or "")


def said() -> str:
    """What the environment says of this process, for one that waits for others."""
    return ", ".join(f"{name}={os.environ[name]}" for name in OURS if os.environ.get(name))
