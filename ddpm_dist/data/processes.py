"""A function over numbers on all cores, whose processes never outlive whoever started them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ddpm_dist.errors import DataError

T = TypeVar("T")

CHECK_PARENT_S = 2.0
SMALL_BYTES = 2**26
PR_SET_PDEATHSIG = 1


def default_workers(nbytes: int) -> int:
    """All cores, or this process alone for work that is done before others have started."""
    return 1 if nbytes < SMALL_BYTES else os.cpu_count() or 1


def in_processes(make: Callable[[], Callable[[int], T]], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """`make()(number)` for each number, in order. `make` is called once in each process; 1 worker is this process."""
    if workers == 1 or len(numbers) < 2:
        yield from map(make(), numbers)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(numbers)), context, _start, (make, os.getpid())) as pool:
        try:
            yield from pool.map(_call, numbers)
        except BrokenProcessPool:
            raise DataError(
                "a process ended before its work did (killed, perhaps for lack of memory); fewer --workers need less, "
                "and the same command goes on from here"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_function: Callable[[int], Any]


def _start(make: Callable[[], Callable[[int], Any]], parent: int) -> None:
    global _function
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _function = make()


def _leave_with(parent: int) -> None:
    """A killed parent can't stop its pool. This is for a parent that died before prctl, and where there is none."""
    while os.getppid() == parent:
        time.sleep(CHECK_PARENT_S)
    os._exit(1)


def _call(number: int) -> Any:
    return _function(number)
