"""Permutations of any size, and keys for them: pure functions of integers."""

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

FEISTEL_ROUNDS = 6
SORT_UP_TO = 256
GOLDEN_64 = np.uint64(0x9E3779B97F4A7C15)
MASK_64 = (1 << 64) - 1


def mix64(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> int:
    """A 64-bit key of several non-negative integers; other parts, or another order of them, give another key."""
    key = 0
    for part in parts:
        key = (key ^ part) + 0x9E3779B97F4A7C15 & MASK_64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
        key = (key ^ key >> 27) * 0x94D049BB133111EB & MASK_64
        key ^= key >> 31
    return key


def permute(i: Ints, n: int, key: int) -> Ints:
    """σ(i) of a pseudorandom permutation σ of 0..n−1 that the key chooses; 0 ≤ i < n, any shape.

    Costs the same for any n: nothing of size n is made. A Feistel network of additions modulo ⌈√n⌉
    (Luby & Rackoff 1988), with cycle walking (Black & Rogaway 2002) for the at most 2√n values beyond n.
    Such a network reaches too few of the permutations of a handful, so a small n sorts random words.
    """
    if n <= SORT_UP_TO:
        words = mix64(np.arange(n, dtype=np.uint64) * GOLDEN_64 + np.uint64(key))
        return np.argsort(words, kind="stable")[i]
    side = np.uint64(math.isqrt(n - 1) + 1 if n > 1 else 1)
    rounds = np.array([key_of(key, r) for r in range(FEISTEL_ROUNDS)], dtype=np.uint64)
    x = _feistel(i.astype(np.uint64), side, rounds)
    while (outside := x >= np.uint64(n)).any():
        x[outside] = _feistel(x[outside], side, rounds)
    return x.astype(np.int64)


def _feistel(x: Words, side: np.uint64, rounds: Words) -> Words:
    left, right = x // side, x % side
    for word in rounds:
        left, right = right, (left + mix64(right * GOLDEN_64 + word) % side) % side
    return left * side + right
