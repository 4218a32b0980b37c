"""What malloc does with the memory that a process has freed."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_BLOCK = 2**30
_NEVER = 2**31 - 1
_HEAP = 2**26
"""What glibc reserves at once for threads other than the first."""


def keep_freed_memory() -> None:
    """Has malloc keep freed memory in this process, for the next step; without glibc nothing changes.

    A step allocates and frees the same activations and gradients each time. By default every block of some
    megabytes then comes from the kernel and goes back to it, zeroed, at a page fault for every 4 kB: 3-10 % of
    a training step of the CIFAR-10 network. The peak stays what it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_TOP_PAD, _HEAP)
