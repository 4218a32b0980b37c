"""Philox4x32-10 and Box and Muller's normal numbers, one kernel each, of the words that `rng.py` defines.

Words are those of the CPU, bit for bit. Normal numbers are computed in float64 by the same sequence of operations, and
rounded once. The device's logarithm, sine and cosine (libdevice) and the CPU's may differ in their last bits, which
about one normal in 10⁸ shows: it rounds to the neighbouring float32. So all agree within one unit in the last place.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
UNIT = triton.language.constexpr(2.0**-32)
TURN = triton.language.constexpr(2.0 * math.pi * 2.0**-32)
"""Of a word: the fraction of 1, and of a turn."""


@triton.jit
def _word(at, index, top, seed):  # type: ignore[no-untyped-def]
    """Words `at` of an index's stream, uint32. top: purpose << 24 | step."""
    block = (at // 4).to(tl.uint32)
    zeros = tl.zeros_like(block)
    low, high = zeros + (index & 0xFFFFFFFF).to(tl.uint32), zeros + (index >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, block, low, high, zeros + top.to(tl.uint32))
    lane = at % 4
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit(do_not_specialize=["seed", "top", "number"])
def _words(indices, out, seed, top, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = _word(at, tl.load(indices + row), top, seed)
    tl.store(out + row * number + at, found.to(tl.int64), at < number)


@triton.jit(do_not_specialize=["seed", "top", "number"])
def _normals(indices, out, seed, top, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pair i of a row: its radius is of word i, its angle of word pairs + i."""
    row, pairs = tl.program_id(0).to(tl.int64), (number + 1) // 2
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row)
    unit, turn = tl.full([BLOCK], UNIT, tl.float64), tl.full([BLOCK], TURN, tl.float64)
    half, minus_two = tl.full([BLOCK], 0.5, tl.float64), tl.full([BLOCK], -2.0, tl.float64)
    radius = tl.sqrt(tl.log((_word(at, index, top, seed).to(tl.float64) + half) * unit) * minus_two)
    angle = _word(pairs + at, index, top, seed).to(tl.float64) * turn
    out += row * number
    tl.store(out + at, (radius * tl.cos(angle)).to(tl.float32), at < pairs)
    tl.store(out + pairs + at, (radius * tl.sin(angle)).to(tl.float32), at < number - pairs)


def words(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    """[B, number] int64 in [0, 2³²). indices: [B] int64. seed: 0 ≤ seed < 2⁶⁴. top: purpose << 24 | step."""
    out = torch.empty(indices.numel(), number, dtype=torch.int64, device=indices.device)
    _launch(_words, indices, out, seed, top, number, number)
    return out


def normal(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    """[B, number] float32, standard normal; arguments as of `words`."""
    out = torch.empty(indices.numel(), number, device=indices.device)
    _launch(_normals, indices, out, seed, top, number, (number + 1) // 2)
    return out


def _launch(kernel: Any, indices: Tensor, out: Tensor, seed: int, top: int, number: int, lanes: int) -> None:
    if out.numel():
        with torch.cuda.device_of(out):
            kernel[(indices.numel(), triton.cdiv(lanes, BLOCK))](indices.contiguous(), out, seed, top, number, BLOCK)
