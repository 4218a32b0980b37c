"""Processes that don't outlive whoever started them."""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
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


def start_family(command: Sequence[str], folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a command with a guardian, which is what is returned, and which all of its descendants end with.

    For families whose members leave their parents: Ray's agents outlive a raylet that was killed, and overwrite the
    environment by which one might know them. The guardian adopts who loses a parent. When its stdin is closed, or its
    starter is dead, it ends the command and all others, removes the folder and ends with 0; when the command ends by
    itself, it ends the others and itself with 1.
    """
    return subprocess.Popen(
        [sys.executable, "-E", __file__, str(folder), *command],
        stdin=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def _guard(folder: str, command: Sequence[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = start_bound(command, stdin=subprocess.DEVNULL)
    released = False
    while process.poll() is None and not released:
        released = bool(select.select([sys.stdin], [], [], 0.2)[0])  # its end is all that comes there
    if released:
        end(process, patience_s=5.0)
    while _has_children():
        for descendant in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        time.sleep(0.05)
    if released:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if released else 1


def _has_children() -> bool:
    """After taking note of those that have ended. Orphans of a descendant are children before it is gone."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1], sys.argv[2:]))
