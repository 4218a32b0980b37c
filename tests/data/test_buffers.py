"""Memory comes back only when nobody can see it any longer."""

import errno
import multiprocessing
import os

import numpy as np
import pytest
import torch

from ddpm_dist.data.buffers import Buffers, SharedBytes
from ddpm_dist.errors import LoaderProcessError


def test_memory_is_used_again_after_its_last_holder() -> None:
    buffers = Buffers((2, 3))
    first = buffers.take()
    address = first.ctypes.data
    tensor = torch.from_numpy(first).permute(1, 0)
    part = tensor[:1].numpy()
    del first, tensor
    assert buffers.take().ctypes.data != address  # `part` still shows it
    part[:] = 7
    assert (part == 7).all()
    del part
    assert address in {buffers.take().ctypes.data, buffers.take().ctypes.data}


def test_all_that_are_held_differ() -> None:
    buffers = Buffers((5,))
    held = [buffers.take() for _ in range(4)]
    for i, array in enumerate(held):
        array[:] = i
    assert [int(array[0]) for array in held] == [0, 1, 2, 3]


def fill(memory: SharedBytes, value: int) -> None:
    np.frombuffer(memory.view, np.uint8)[:] = value


def test_memory_is_shared_with_a_spawned_process_and_not_through_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedBytes(3 * 4096 + 5)
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(memory, 7))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert bytes(memory.view) == b"\7" * (3 * 4096 + 5)
    assert "/dev/shm" not in os.readlink(f"/proc/self/fd/{memory.fd}")

    def nothing_left(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", nothing_left)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LoaderProcessError, match=r"no memory for the 1 MiB of a loader process's batches; fewer"):
        SharedBytes(2**20)
    assert len(os.listdir("/proc/self/fd")) == open_before
