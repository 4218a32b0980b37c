"""The counter-based generator against Random123's vectors, scipy's tests, and its own promises."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ddpm_dist import rng
from ddpm_dist.rng import Purpose

SHAPE = (3, 8, 8)


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox4x32(counter, key):
    """Salmon et al. 2011, in plain integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_reference_gives_random123s_known_answers(counter, key, result):
    assert philox4x32(words(counter), words(key)) == words(result)


def test_first_known_answer_directly():
    assert rng.philox(0, 0, torch.tensor([0]), 4)[0].tolist() == words(KNOWN_ANSWERS[0][2])


@pytest.mark.parametrize("seed", [0, 1, 0x299F31D0A4093822, 2**64 - 1])
@pytest.mark.parametrize(("purpose", "step"), [(0, 0), (Purpose.EPS, 5), (255, 2**24 - 1)])
def test_philox_equals_the_reference(seed, purpose, step):
    indices = torch.tensor([0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
    found = rng.philox(seed, purpose, indices, 10, step)
    assert found.dtype == torch.int64
    assert found.shape == (6, 12)
    for row, index in zip(found.tolist(), indices.tolist(), strict=True):
        for block in range(3):
            counter = (block, index & 0xFFFFFFFF, index >> 32, int(purpose) << 24 | step)
            assert row[4 * block : 4 * block + 4] == philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def test_normal_is_box_and_mullers():
    found = rng.normal(9, Purpose.X_T, torch.tensor([4]), (3, 5))[0].flatten()
    integers = rng.philox(9, Purpose.X_T, torch.tensor([4]), 16)[0].numpy().astype(np.float64)
    u, angle = (integers[:8] + 0.5) / 2**32, integers[8:16] / 2**32 * 2 * np.pi
    radius = np.sqrt(-2 * np.log(u))
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:15]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1,), (3, 5, 5), ()])
def test_numbers_of_an_index_are_the_same_bytes_in_any_batch(shape):
    indices = torch.tensor([12, 3, 2**40, 0, 7, 8, 9])
    for draw in (rng.normal, rng.uniform):
        seven = draw(5, Purpose.REVERSE, indices, shape, step=17)
        assert seven.shape == (7, *shape)
        for row, index in zip(seven, indices, strict=True):
            assert torch.equal(row, draw(5, Purpose.REVERSE, index.reshape(1), shape, step=17)[0])


def test_rows_made_in_several_chunks_are_the_same_bytes(monkeypatch):
    whole = rng.normal(0, Purpose.EPS, torch.arange(50), SHAPE)
    monkeypatch.setattr(rng, "CACHED_NUMBERS", 3 * math.prod(SHAPE))
    assert torch.equal(rng.normal(0, Purpose.EPS, torch.arange(50), SHAPE), whole)


def test_threads_do_not_change_the_bytes():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rng.normal(0, Purpose.EPS, torch.arange(64), (3, 32, 32))
        torch.set_num_threads(4)
        assert torch.equal(rng.normal(0, Purpose.EPS, torch.arange(64), (3, 32, 32)), one)
    finally:
        torch.set_num_threads(before)


def test_streams_are_unlike():
    indices = torch.arange(16)
    base = rng.normal(0, Purpose.EPS, indices, SHAPE, step=1)
    others = {
        "seed": rng.normal(1, Purpose.EPS, indices, SHAPE, step=1),
        "high half of the seed": rng.normal(1 << 32, Purpose.EPS, indices, SHAPE, step=1),
        "purpose": rng.normal(0, Purpose.X_T, indices, SHAPE, step=1),
        "step": rng.normal(0, Purpose.EPS, indices, SHAPE, step=2),
        "index": rng.normal(0, Purpose.EPS, indices + 16, SHAPE, step=1),
        "high half of the index": rng.normal(0, Purpose.EPS, indices + (1 << 32), SHAPE, step=1),
    }
    n = base.numel()
    for name, other in others.items():
        correlation = np.corrcoef(base.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n), name


def test_normal_passes_kolmogorov_smirnov_and_has_its_moments():
    x = rng.normal(3, Purpose.EPS, torch.arange(500), (1, 20, 20)).double().numpy()
    n = x.size
    assert scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert x.var() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert abs(scipy.stats.skew(x.ravel())) < 5 * math.sqrt(6 / n)
    assert abs(scipy.stats.kurtosis(x.ravel())) < 5 * math.sqrt(24 / n)
    pixels = x.reshape(500, 400)
    correlation = np.corrcoef(pixels.T)[~np.eye(400, dtype=bool)]
    assert np.abs(correlation).max() < 6 / math.sqrt(500)
    assert np.isfinite(x).all()


def test_uniform_passes_kolmogorov_smirnov_in_its_range():
    u = rng.uniform(3, Purpose.T, torch.arange(100000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("high", [1, 2, 10, 1000])
def test_integers_are_uniform(high):
    found = rng.integers(0, Purpose.T, torch.arange(50000), high)
    assert found.dtype == torch.int64
    counts = np.bincount(found, minlength=high)
    assert len(counts) == high
    if high > 1:
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_extreme_words_give_finite_normals(monkeypatch):
    lowest, highest = torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 2**32 - 1)
    for value in (lowest, highest):
        monkeypatch.setattr(rng, "philox", lambda *args, value=value: value)
        found = rng.normal(0, 0, torch.tensor([0]), (4,))
        assert found.isfinite().all()
        assert found.abs().max() < 7
        # u is (0 + 1/2) / 2^32, or as near to 1
        u = 2.0**-33 if value is lowest else 1 - 2.0**-33
        assert found.max().item() == pytest.approx(math.sqrt(-2 * math.log(u)), rel=1e-6)


def test_fold_is_a_chain_of_philox():
    seed = 0
    for part in (3, 2**40, 5):
        low, high = rng.philox(seed, 0, torch.tensor([part]), 2)[0, :2].tolist()
        seed = high << 32 | low
    assert rng.fold(3, 2**40, 5) == seed
    assert rng.fold(1, 2) != rng.fold(2, 1)
    assert 0 <= rng.fold(7) < 2**64


def test_no_indices_give_no_numbers():
    assert rng.normal(0, Purpose.EPS, torch.tensor([], dtype=torch.int64), SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "seed is"), ({"step": 2**24}, "room for"), ({"step": -1}, "room")],
)
def test_counter_limits(arguments, words):
    with pytest.raises(ValueError, match=words):
        rng.philox(**{"seed": 0, "purpose": 0, "indices": torch.tensor([0]), "words": 4, "step": 0, **arguments})
