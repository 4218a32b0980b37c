"""Memory comes back only when nobody can see it any longer."""

import torch

from ddpm_dist.data.buffers import Buffers


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
