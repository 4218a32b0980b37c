"""Memory for batches, used again."""

import math
import weakref

import numpy as np

from ddpm_dist.data.decode import Pixels


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
