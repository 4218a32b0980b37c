"""How much memory this process's node, and the control groups that it is in, have left."""

from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 2**62


def available_bytes(root: Path = Path("/")) -> int:
    """What new pages may take before something is ended or swapped; UNKNOWN where nothing says it (no Linux).

    The least of the node's and of each control group's, version 1 or 2, up to the outermost that can be seen. Caches of
    files count as free. root: of `proc` and `sys`.
    """
    return min([_node(root), *_groups(root)])


def _node(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), UNKNOWN)


def _groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _up(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            yield from _up(root / "sys/fs/cgroup/memory", path, *names)


def _up(mount: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """A group and those around it. In a container the path may be the host's, and only the mount itself be there."""
    folder = mount / path.strip("/")
    while True:
        try:
            most, now = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield max(0, most - now + cached)
        except (OSError, ValueError):
            pass  # "max", or not there
        if folder == mount:
            return
        folder = folder.parent
