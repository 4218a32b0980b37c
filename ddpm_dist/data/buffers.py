"""Memory for batches: used again, or shared with the process that fills it."""

import errno
import math
import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np

from ddpm_dist.data.decode import Pixels
from ddpm_dist.errors import LoaderProcessError


class Buffers:
    """Arrays of one shape whose memory comes back when nobody holds them any longer.

    A batch of 128 images of 256 pixels has 25 MB. From malloc, a few of them at a time leave holes between the blocks
    of shards (60 MB were measured), or cost a page fault for every 4 kB.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[Pixels] = []

    def take(self) -> Pixels:
        """An array with any contents."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(math.prod(self._shape), np.uint8)
        array = memory.reshape(self._shape)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class SharedBytes:
    """So many bytes that this process shares with one that it spawns, which gets the same as an argument.

    Not in /dev/shm, of which containers have 64 MB: what doesn't fit there ends whoever touches it with SIGBUS. All of
    it is taken when it is made; LoaderProcessError where there isn't so much.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        """fd: of the memory that another process made."""
        self.fd = _take(size) if fd is None else fd
        self.view = mmap.mmap(self.fd, size)
        weakref.finalize(self, os.close, self.fd)

    def __reduce__(self) -> Any:
        return _rebuild, (len(self.view), reduction.DupFd(self.fd))


def _rebuild(size: int, fd: Any) -> SharedBytes:
    return SharedBytes(size, fd.detach())


def _take(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("ddpm_dist loader")
    else:
        fd, path = tempfile.mkstemp(prefix="ddpm-loader-")
        os.unlink(path)
    try:
        os.posix_fallocate(fd, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(fd, size)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOMEM, errno.ENOSPC):
            raise
        raise LoaderProcessError(
            f"there is no memory for the {size / 2**20:.0f} MiB of a loader process's batches; fewer data.workers or a "
            "smaller batch for each rank need less"
        ) from None
    return fd
