"""Checks of one node: memory, files, disks, limits, clock, compilers."""

import ctypes
import os
import resource
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil  # type: ignore[import-untyped]

from ddpm_dist.config import Config
from ddpm_dist.doctor.rows import Asked, Check, Failed, Remark, Skipped, check
from ddpm_dist.engine import INFINIBAND, SHM, SHM_BYTES
from ddpm_dist.planning import count, state_bytes

MIB, GIB = 2**20, 2**30
MEMLOCK_BYTES = 64 * MIB
FREE_BYTES = 1 * GIB
RAY_FULL = 0.95
"""Used share of a disk from which on Ray stores nothing more on it."""
SOCKET_PATH = 107
RAY_SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
OWN_SOCKET = len("/pymp-00000000/listener-00000000")
_STA_UNSYNC = 0x0040
_STATUS_AT = 40
"""Offset of `status` in struct timex, where long has 8 bytes."""


@check("shared memory", "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)")
def shared_memory(asked: Asked) -> str:
    """NCCL and Ray's object store lie there; where it is full, they die of SIGBUS."""
    if not SHM.is_dir():
        raise Skipped("not on this system")
    size = shutil.disk_usage(SHM).total
    if size < SHM_BYTES:
        raise Failed(f"{SHM} has {amount(size)}, {amount(SHM_BYTES)} are needed")
    return f"{SHM} has {amount(size)}"


@check("locked memory", "`ulimit -l unlimited` where Ray or the launcher is started (containers: --ulimit memlock=-1)")
def locked_memory(asked: Asked) -> str:
    """RLIMIT_MEMLOCK: InfiniBand registers the memory that it sends from."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else amount(limit)
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        if 0 <= limit < MEMLOCK_BYTES:
            raise Failed(f"{text} may be locked, and there is InfiniBand ({min(p.name for p in INFINIBAND.iterdir())})")
        return text
    return f"{text}; no InfiniBand here, which needs it"


@check("open files", "`ulimit -n 65536` where Ray or the launcher is started (containers: --ulimit nofile=65536)")
def open_files(asked: Asked) -> str:
    """RLIMIT_NOFILE: gloo and NCCL hold connections to each rank, Ray and the loader some hundred files more."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    ranks = asked.cfg.worker_range[1] if asked.cfg else 1
    needed = 1024 + 4 * ranks
    if limit != resource.RLIM_INFINITY and limit < needed - 1:
        raise Failed(f"{limit} may be open, about {needed} are needed for {ranks} ranks")
    return f"{limit} may be open"


@check("disk", "free some, or set TMPDIR, RAY_TMPDIR or data.cache_dir to a folder on a larger disk")
def disk(asked: Asked) -> str:
    """Room for temporary files, Ray's, the shard cache, and the states of a run on a disk."""
    found = []
    for folder, needed, what in _folders(asked):
        usage = shutil.disk_usage(_existing(folder))
        if usage.free < needed:
            raise Failed(f"{folder}: {amount(usage.free)} are free, {amount(needed)} are needed for {what}")
        if asked.under_ray and what == RAYS and usage.used > RAY_FULL * usage.total:
            raise Failed(f"{folder}: {100 * usage.used / usage.total:.0f} % full; Ray stops at {100 * RAY_FULL:.0f} %")
        found.append(f"{folder} {amount(usage.free)} free")
    return ", ".join(dict.fromkeys(found))


RAYS = "Ray's files"


def _folders(asked: Asked) -> list[tuple[Path, float, str]]:
    """(folder, bytes that have to be free there, for what)."""
    wanted: list[tuple[Path, float, str]] = [(Path(tempfile.gettempdir()), FREE_BYTES, "temporary files")]
    if asked.under_ray:
        wanted.append((Path(os.environ.get("RAY_TMPDIR") or "/tmp"), FREE_BYTES, RAYS))  # noqa: S108
    cfg = asked.cfg
    if cfg and cfg.data.cache_dir and asked.works:
        cache = Path(cfg.data.cache_dir)
        held = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) if cache.is_dir() else 0
        wanted.append((cache, max(0, cfg.data.cache_bytes - held), "data.cache_dir (data.cache_bytes)"))
    if cfg and cfg.run.url.startswith("file://"):
        wanted.append((_path(cfg.run.url), _kept_bytes(cfg), "the states that are kept and one more (run.url)"))
    return wanted


def _kept_bytes(cfg: Config) -> float:
    return (cfg.checkpoint.keep_last + 1) * state_bytes(count(cfg).parameters, 1 + len(cfg.ema.power))


@check("temporary folder", "set TMPDIR (and RAY_TMPDIR) to a folder of your own that is there, with a short path")
def temporary_folder(asked: Asked) -> str:
    """Can be written to, and sockets fit into its name: a Unix socket's path has 107 bytes."""
    named = os.environ.get("TMPDIR")
    folder = named or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Failed(f"{'TMPDIR ' if named else ''}{folder}: {error.strerror}") from None
    rays = os.environ.get("RAY_TMPDIR") or ""
    for name, path, socket_name in (("TMPDIR", folder, OWN_SOCKET), ("RAY_TMPDIR", rays, RAY_SOCKET)):
        if len(os.fsencode(path)) + socket_name > SOCKET_PATH:
            raise Failed(
                f"{name} {path}: has {len(path)} bytes, at most {SOCKET_PATH - socket_name} leave room for sockets"
            )
    return folder


@check("NTP", "start chrony, ntpd or systemd-timesyncd on this node (for a container or VM: on its host)")
def ntp(asked: Asked) -> str:
    """Whether the kernel says that something keeps its clock."""
    buffer = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        raise Skipped("this system doesn't say") from None
    if state < 0:
        raise Skipped("this system doesn't say")
    if int.from_bytes(buffer.raw[_STATUS_AT : _STATUS_AT + 4], "little") & _STA_UNSYNC:
        raise Remark("the kernel says that nothing keeps its clock")
    return "the kernel's clock is kept"


@check(
    "compilers", "apt-get install g++ ninja-build (or what your system calls them) on every node, or leave the key out"
)
def compilers(asked: Asked) -> str:
    """What torch.compile and DeepSpeedCPUAdam call."""
    cfg, needed = asked.config, {}
    if cfg.model.compile:
        cpu = not cfg.cluster.gpus_per_worker
        needed["model.compile"] = [os.environ.get("CXX", "g++") if cpu else os.environ.get("CC", "gcc")]
    if cfg.zero.offload_optimizer:
        needed["zero.offload_optimizer"] = [os.environ.get("CXX", "g++"), "ninja"]
    if not needed or not asked.works:
        raise Skipped("nothing here needs one")
    for key, programs in needed.items():
        absent = [program for program in programs if shutil.which(program) is None]
        if absent:
            raise Failed(f"{key}: true, and {' and '.join(absent)} is not on this node's PATH")
    return ", ".join(f"{key}: {', '.join(programs)}" for key, programs in needed.items())


@check("CPUs", "fewer workers on this node, a smaller cluster.cpus_per_worker, or a larger quota of the container")
def cpus(asked: Asked) -> str:
    """Cores that this process may use, by affinity and the container's quota."""
    there = available_cpus()
    wanted = asked.ranks_here * asked.cfg.cluster.cpus_per_worker if asked.cfg else 0
    if wanted > there:
        raise Remark(f"{there:g}, and {asked.ranks_here} workers take {wanted:g} (cluster.cpus_per_worker)")
    return f"{there:g}"


def available_cpus() -> float:
    """Cores of this process: those that it may run on, and the share that its cgroup has of them."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def available_memory() -> int:
    """Bytes that processes here may still take, by the system and by the container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return free if limit == "max" else max(0, min(free, int(limit) - used))
    except (OSError, ValueError):
        return free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def amount(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


CHECKS: tuple[Check[Asked], ...] = (
    cpus,
    shared_memory,
    locked_memory,
    open_files,
    disk,
    temporary_folder,
    ntp,
    compilers,
)
"""In the order of the table."""
