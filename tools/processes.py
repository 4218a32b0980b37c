"""Processes that don't outlive whoever started them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_LAUNCHER = (
    "import ctypes, os, sys\n"
    f"if sys.platform == 'linux': ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"  # the parent died before prctl could know it
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def start_bound(command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a process that the kernel kills when the calling thread dies, however it dies.

    Call it in the main thread. (Linux; elsewhere it is a plain Popen.) A launcher sets it and becomes the command:
    `preexec_fn` isn't safe in a process with threads.
    """
    return subprocess.Popen([sys.executable, "-S", "-E", "-c", _LAUNCHER, str(os.getpid()), *command], **options)


def end(process: subprocess.Popen[Any], patience_s: float = 10.0) -> None:
    """SIGTERM, and SIGKILL when the patience is over. Returns when the process is gone."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_all_with(name: str, value: str) -> None:
    """SIGKILL for every process of this user whose environment began with `name=value`, until there is none."""
    while found := with_environment(name, value):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def with_environment(name: str, value: str) -> list[int]:
    """Pids of the processes, but for this one, whose environment began with `name=value` (Linux; elsewhere none)."""
    wanted, found = f"{name}={value}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def start_guardian(name: str, value: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that waits until its stdin is closed, or its starter is dead, and then cleans up.

    It ends all processes with `name=value` and removes the folder. For families whose members don't all die together:
    Ray's agents outlive a raylet that was killed.
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, name, value, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_all_with(sys.argv[1], sys.argv[2])
    shutil.rmtree(sys.argv[3], ignore_errors=True)
