"""Locks of a folder of standbys: one asker starts, and one standby of a name runs."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ddpm_dist.errors import StandbyError

RUNNING = ".running"
"""Behind its name, the file that a standby holds locked from before its imports to its end."""


@contextlib.contextmanager
def locked(folder: Path, patience_s: float) -> Iterator[None]:
    """One starts, the others wait."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StandbyError(f"{folder}: another process has been starting a standby for too long") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def runs(place: Path) -> bool:
    """Whether a standby of this name holds its lock: it is starting, serving or ending."""
    try:
        lock = os.open(f"{place}{RUNNING}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
