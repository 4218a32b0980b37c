"""Counter-based random numbers: what is drawn depends on integers alone, never on what was drawn before.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
Its 128-bit counter is (block within the sample, index low, index high, purpose << 24 | step) and its
64-bit key is the seed. So the numbers of sample `i` are the same bytes in a batch of 1 and of 7, on any
rank, after any restart; no generator state exists that could be saved or lost.

On a GPU each call is one kernel (`kernels/noise.py`), elsewhere a hundred small operations: `device.fused` decides.
Words are the same bits on all devices; normals within one unit in the last place, nearly all the same bits.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ddpm_dist import device as devices, kernels

MASK32 = 0xFFFFFFFF
MAX_STEP = (1 << 24) - 1
ROUNDS = 10
CACHED_NUMBERS = 1 << 18
"""Normals made at once on a CPU, at about 40 bytes each."""
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Purpose(IntEnum):
    """What a number is drawn for; each purpose is a stream of its own."""

    T = 1  # diffusion time of a training sample
    EPS = 2  # forward noise of a training sample
    FLIP = 3  # horizontal flip of a sample in an epoch
    LABEL_DROPOUT = 4
    X_T = 5  # start of a reverse chain
    REVERSE = 6  # noise of a reverse step
    LIKELIHOOD = 7
    LABEL = 8  # class drawn for a generated image
    RENOISE = 9  # RePaint's jumps back, and interpolation's forward noise
    INIT = 10  # weights of a new network


def philox(seed: int, purpose: int, indices: Tensor, words: int, step: int = 0) -> Tensor:
    """Philox4x32-10 words of each index.

    seed: 0 ≤ seed < 2⁶⁴. purpose: 0..255. step: 0..2²⁴−1. indices: [B] int64, each ≥ 0.
    Returns [B, 4·⌈words/4⌉] int64 with values in [0, 2³²), on the device of `indices`.
    """
    top, blocks = _top(seed, purpose, step), -(-words // 4)
    if devices.fused(indices.device):
        found: Tensor = torch.ops.ddpm_dist.words(indices, _signed(seed), top, 4 * blocks)
        return found
    shape, device = (indices.numel(), blocks), indices.device
    c0 = torch.arange(blocks, device=device).repeat(indices.numel(), 1)
    c1 = (indices & MASK32)[:, None].repeat(1, blocks)
    c2 = ((indices >> 32) & MASK32)[:, None].repeat(1, blocks)
    c3 = torch.full(shape, top, device=device)
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        # In place: allocating each intermediate costs more than computing it. int64 products wrap and shifts are
        # arithmetic, so high words are masked; low words (c1, c3) keep rubbish above them, which the same mask drops.
        torch.mul(c0, MULTIPLIER_0, out=p0)
        torch.mul(c2, MULTIPLIER_1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK32)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK32)
        c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return torch.stack((c0, c1.bitwise_and_(MASK32), c2, c3.bitwise_and_(MASK32)), dim=-1).reshape(shape[0], 4 * blocks)


def uniform(
    seed: int,
    purpose: int,
    indices: Tensor,
    shape: Sequence[int] = (),
    step: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1): [B, *shape] float64, exact multiples of 2⁻³². One row per index."""
    indices = indices.to(device) if device is not None else indices
    n = math.prod(shape)
    words = philox(seed, purpose, indices, n, step)[:, :n]
    return (words.double() * 2.0**-32).reshape(indices.numel(), *shape)


def normal(
    seed: int,
    purpose: int,
    indices: Tensor,
    shape: Sequence[int],
    step: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers: [B, *shape] float32. One row per index.

    Box & Muller (1958) in float64, rounded once at the end, so that devices differ at most where
    their float64 log and cos do.
    """
    indices = indices.to(device) if device is not None else indices
    n, top = math.prod(shape), _top(seed, purpose, step)
    if devices.fused(indices.device):
        found: Tensor = torch.ops.ddpm_dist.normal(indices, _signed(seed), top, n)
        return found.reshape(indices.numel(), *shape)
    out = torch.empty(indices.numel(), n, device=indices.device)
    # On a CPU a few rows at a time, so that what is between stays in its caches; rows don't know of each other.
    rows = indices.numel() if indices.device.type != "cpu" else max(1, CACHED_NUMBERS // max(n, 1))
    for start in range(0, indices.numel(), max(rows, 1)):
        _box_muller(philox(seed, purpose, indices[start : start + rows], n + n % 2, step), out[start : start + rows])
    return out.reshape(indices.numel(), *shape)


def _box_muller(words: Tensor, out: Tensor) -> None:
    """Fills out [B,n] float32 from words [B,≥n] (n rounded up to even)."""
    n = out.shape[1]
    pairs = -(-n // 2)
    radius = words[:, :pairs].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = words[:, pairs : 2 * pairs].double().mul_(2.0 * math.pi * 2.0**-32)
    out[:, :pairs] = radius * angle.cos()
    out[:, pairs:] = (radius.mul_(angle.sin_()))[:, : n - pairs]


def _top(seed: int, purpose: int, step: int) -> int:
    """The highest word of the counter; ValueError for a step or seed that the generator has no room for."""
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step is {step}; the counter has room for 0..{MAX_STEP}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in 0..2^64-1")
    return int(purpose) << 24 | step


def _signed(seed: int) -> int:
    """The same 64 bits as the int64 that an operator takes."""
    return seed - (seed >> 63 << 64)


torch.library.define("ddpm_dist::words", "(Tensor indices, int seed, int top, int number) -> Tensor")
torch.library.define("ddpm_dist::normal", "(Tensor indices, int seed, int top, int number) -> Tensor")


def _fused_words(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    return kernels.words(indices, seed % (1 << 64), top, number)


torch.library.impl("ddpm_dist::words", "cuda", _fused_words)


def _fused_normal(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    return kernels.normal(indices, seed % (1 << 64), top, number)


torch.library.impl("ddpm_dist::normal", "cuda", _fused_normal)


@torch.library.register_fake("ddpm_dist::words")
def _words_like(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    return indices.new_empty(indices.numel(), number)


@torch.library.register_fake("ddpm_dist::normal")
def _normals_like(indices: Tensor, seed: int, top: int, number: int) -> Tensor:
    return indices.new_empty(indices.numel(), number, dtype=torch.float32)


def integers(
    seed: int, purpose: int, indices: Tensor, high: int, step: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Integers uniform in 0..high−1: [B] int64. The bias is at most high·2⁻³²."""
    return (uniform(seed, purpose, indices, (), step, device) * high).long()


def fold(*parts: int) -> int:
    """One 64-bit seed from several integers (each 0 ≤ part < 2⁶⁴), for generators that want a plain seed.

    A chain of Philox calls in plain integers, so that it costs microseconds.
    """
    seed = 0
    for part in parts:
        c0, c1, c2, c3 = 0, part & MASK32, part >> 32, 0
        k0, k1 = seed & MASK32, seed >> 32
        for _ in range(ROUNDS):
            p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
            c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & MASK32, p0 >> 32 ^ c3 ^ k1, p0 & MASK32
            k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
        seed = c1 << 32 | c0
    return seed
