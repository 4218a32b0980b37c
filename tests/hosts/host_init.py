"""Process 1 of a host: gives it its own name, disk places and shared memory, and reaps orphans for as long as it lives.

    host_init.py NAME DISK KEEP…

It runs in new network, mount, host name and process namespaces. DISK has etc/, tmp/ and home/, which appear as
files of /etc, as /tmp and as /run/home. KEEP are paths that stay visible even if they lie below /tmp.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main(name: str, disk: Path, keep: list[Path]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children, adopted ones too, leave no zombies
    socket.sethostname(name)
    disk_handle = os.open(disk, os.O_PATH)
    kept = [(path, os.open(path, os.O_PATH)) for path in sorted(keep) if path.is_relative_to("/tmp")]
    for file in (disk / "etc").iterdir():
        mount("--bind", file, f"/etc/{file.name}")
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir()
    Path("/run/home").mkdir(0o700)
    mount("--bind", disk / "home", "/run/home")
    mount("--bind", f"/proc/self/fd/{disk_handle}/tmp", "/tmp", handle=disk_handle)
    for path, handle in kept:
        path.mkdir(parents=True, exist_ok=True)
        # the link of a descriptor leads to what /tmp hides by now, its path (which mount would make of it) doesn't
        mount("--no-canonicalize", "--bind", f"/proc/self/fd/{handle}", path, handle=handle)
    print("ready", flush=True)
    while True:
        signal.pause()


def mount(*arguments: str | Path, handle: int | None = None) -> None:
    # subprocess can't ask for the end of a child that init reaps, so its exit code is told on its output
    command = " ".join(["mount", *(f"'{argument}'" for argument in arguments)])
    shell = f"{command} && echo mounted"
    done = subprocess.run(
        ["sh", "-c", shell], stdout=subprocess.PIPE, pass_fds=() if handle is None else (handle,), text=True
    )
    if done.stdout.strip() != "mounted":
        sys.exit(f"{command}: failed")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
