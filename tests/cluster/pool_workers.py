"""Workers for the tests of the actor pool: importable in the actors, each does one thing to its tasks."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_dist.errors import SamplingError, SnapshotError, UnreachableError, WorkerRefusedError


def square() -> Callable[[int], tuple[int, int]]:
    """(task², pid)."""
    return lambda task: (time.sleep(0.02), (task * task, os.getpid()))[1]


class Together:
    """(task², pid), but not before so many processes have a task each."""

    def __init__(self, folder: str, processes: int) -> None:
        self.folder, self.processes = Path(folder), processes

    def __call__(self, task: int) -> tuple[int, int]:
        (self.folder / str(os.getpid())).touch()
        while len(list(self.folder.iterdir())) < self.processes:
            time.sleep(0.05)
        return task * task, os.getpid()


class Sometimes:
    """Raises on odd tasks: for ever, or until a file tells of so many tries."""

    def __init__(self, folder: str, tries: int, error: str) -> None:
        self.folder, self.tries, self.error = Path(folder), tries, error

    def __call__(self, task: int) -> int:
        if task % 2:
            with (self.folder / str(task)).open("a") as file:
                file.write(".")
            if len((self.folder / str(task)).read_text()) <= self.tries:
                raise {"own": SamplingError, "may pass": UnreachableError, "foreign": KeyError}[self.error](
                    f"no {task}"
                )
        return task


class Dying:
    """SIGKILLs its process at the first try of every third task."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, task: int) -> int:
        mark = self.folder / str(task)
        if task % 3 == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task


class Picky:
    """Refuses to work, but for the process that made a file first."""

    def __init__(self, folder: str, all_refuse: bool) -> None:
        mark = Path(folder) / "first"
        self.refuses = all_refuse or mark.exists()
        mark.touch()

    def __call__(self, task: int) -> int:
        if self.refuses:
            raise WorkerRefusedError("it has another device")
        time.sleep(0.05)
        return task


def broken() -> Callable[[Any], Any]:
    raise SnapshotError("there is no snapshot")
