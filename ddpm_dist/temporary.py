"""Folders in the temp folder that no kill leaves there for good: the next start removes them.

A folder of ours has a mark, a file that its process holds a lock on, and the kernel lets go of that however the process
ends. So one is removed only where it is this user's, has a mark, and nobody lives who might use it. (A process's number
would prove less: another gets it again, and in another container it means something else.)
"""

import fcntl
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "ddpm_dist-"
MARK = "mark"


class TemporaryFolder:
    """An empty folder, until `close`, the end of a `with`, or the end of this process, whatever that is."""

    def __init__(self, purpose: str) -> None:
        """purpose: a word in its name."""
        collect()
        self._root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        self._lock = _mark(self._root)
        self.path = self._root / "files"
        self.path.mkdir()
        self._end = weakref.finalize(self, _remove, self._root, self._lock, os.getpid())

    def close(self) -> None:
        """Removes it with all that is in it; once more does nothing."""
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def collect() -> None:
    """Removes what processes of this user left that were killed."""
    with os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                _remove_if_left(Path(entry.path))


def _mark(root: Path) -> int | None:
    """The descriptor that holds the lock; None where the disk knows no locks, and the folder is never collected.

    The mark gets its name when it is locked: from then on, without a lock it is left.
    """
    new = root / f"{MARK}.new"
    lock = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    os.write(lock, f"of process {os.getpid()}; the next start removes this, once it is unlocked\n".encode())
    new.rename(root / MARK)
    return lock


def _remove_if_left(root: Path) -> None:
    try:
        mark = os.open(root / MARK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # it isn't ours, or is being made or removed at this moment
        return
    try:
        if root.stat().st_uid == os.geteuid():
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
            log.info("removed what a killed process left: %s", root)
    except OSError:  # somebody holds it, who lives
        pass
    finally:
        os.close(mark)


def _remove(root: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that made it
    shutil.rmtree(root, ignore_errors=True)
    if lock is not None:
        os.close(lock)
