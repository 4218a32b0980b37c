"""The convolution peak of tools/bench/model.py: what the network's convolutions take alone, each at its best."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.model_sides import Clock, Theirs, inference_step, make_batch

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class ConvShape(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    size: int  # height and width of the input

    def flops(self, batch: int) -> int:
        """Of a forward pass: two per multiply-add."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return 2 * batch * self.inputs * self.outputs * self.kernel**2 * out**2


def conv_shapes() -> Counter[ConvShape]:
    """The convolutions that UNet2DModel really runs for one image, and how often each."""
    shapes: Counter[ConvShape] = Counter()

    def record(conv: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        c: Any = conv
        shapes[ConvShape(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0],
                         inputs[0].shape[2])] += 1  # fmt: skip

    side = Theirs(torch.float32)
    for module in side.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    inference_step(side, make_batch(1, torch.float32), time.perf_counter)
    return shapes


def conv_seconds(
    shapes: Counter[ConvShape], dtype: torch.dtype, batch: int, rounds: int, clock: Clock
) -> tuple[float, float]:
    """Seconds of all the network's convolutions alone, each at its best: (forward, forward and backward)."""
    forward = backward = 0.0
    for shape, count in shapes.items():
        layouts = [_conv_times(shape, dtype, batch, layout, rounds, clock) for layout in LAYOUTS]
        forward += count * min(layout[0] for layout in layouts)
        backward += count * min(sum(layout) for layout in layouts)
    return forward, backward


def _conv_times(
    shape: ConvShape, dtype: torch.dtype, batch: int, layout: torch.memory_format, rounds: int, clock: Clock
) -> tuple[float, float]:
    x = torch.randn(batch, shape.inputs, shape.size, shape.size).to(dtype).to(memory_format=layout)
    weight = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel).to(dtype).to(memory_format=layout)
    bias = torch.zeros(shape.outputs, dtype=dtype)
    stride, padding = [shape.stride] * 2, [shape.padding] * 2
    gradient = torch.randn_like(F.conv2d(x, weight, bias, stride, padding))
    needed = [shape.inputs > 3, True, True]  # the image itself needs no gradient

    def forward() -> None:
        F.conv2d(x, weight, bias, stride, padding)

    def backward() -> None:
        torch.ops.aten.convolution_backward(
            gradient, x, weight, [shape.outputs], stride, padding, [1, 1], False, [0, 0], 1, needed
        )

    return _best(forward, rounds, clock), _best(backward, rounds, clock)


def _best(action: Callable[[], None], rounds: int, clock: Clock) -> float:
    seconds = []
    for _ in range(rounds):
        start = clock()
        action()
        seconds.append(clock() - start)
    return min(seconds)
