"""Counter-based random numbers: what is drawn depends on integers alone, never on what was drawn before.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
Its 128-bit counter is (block within the sample, index low, index high, purpose << 24 | step) and its
64-bit key is the seed. So the numbers of sample `i` are the same bytes in a batch of 1 and of 7, on any
rank, after any restart; no generator state exists that could be saved or lost.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MAX_STEP = (1 << 24) - 1
ROUNDS = 10
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
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step is {step}; the counter has room for 0..{MAX_STEP}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in 0..2^64-1")
    blocks = -(-words // 4)
    shape = (indices.numel(), blocks)
    c0 = torch.arange(blocks, device=indices.device).expand(shape)
    c1 = (indices & MASK32)[:, None].expand(shape)
    c2 = ((indices >> 32) & MASK32)[:, None].expand(shape)
    c3 = torch.full((1, 1), int(purpose) << 24 | step, device=indices.device).expand(shape)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        # int64 products wrap; the arithmetic shift and the mask still give the right high word.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (p1 >> 32 & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            (p0 >> 32 & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(indices.numel(), 4 * blocks)


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
    n = math.prod(shape)
    pairs = -(-n // 2)
    words = philox(seed, purpose, indices, 2 * pairs, step)[:, : 2 * pairs].double()
    u, angle = words[:, :pairs], words[:, pairs:]
    radius = torch.sqrt(-2.0 * torch.log((u + 0.5) * 2.0**-32))
    angle = angle * (2.0 * math.pi * 2.0**-32)
    pair = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return pair[:, :n].float().reshape(indices.numel(), *shape)


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
