"""Moving averages against float64 arithmetic written out, EDM2's definitions by quadrature, and each other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from ddpm_dist.config import Config
from ddpm_dist.engine.pieces import Piece
from ddpm_dist.recipe import validate
from ddpm_dist.training.ema import Ema, power_exponent, power_label
from ddpm_dist.training.posthoc import Profile, coefficients, distance, inner_product

BATCH = 32


def config(**ema: object) -> Config:
    sections = {
        "run": {"url": "memory://run"},
        "data": {"url": "memory://data", "image_size": 32},
        "train": {"steps": 10, "global_batch": BATCH},
        "ema": ema,
    }
    return validate(sections, "test")


def pieces_of(flat: Tensor, cuts: list[int]) -> list[Piece]:
    """Neighbouring pieces of one flat tensor, as under ZeRO-1, or with gaps between, as under ZeRO-3."""
    pieces, start = [], 0
    for i, cut in enumerate(cuts):
        views = flat[start : start + cut]
        pieces.append(Piece(f"p{i}", torch.Size([cut]), 0, views, torch.zeros(cut), torch.zeros(cut)))
        start += cut
    return pieces


def walk(steps: int, numel: int) -> Tensor:
    """[steps, numel] float32 weights that move as training's do: much at first, less later."""
    generator = torch.Generator().manual_seed(3)
    moves = torch.randn(steps, numel, generator=generator, dtype=torch.float64)
    return (moves / torch.arange(1, steps + 1)[:, None].sqrt()).cumsum(0).float()


DECAYS = {
    "constant": ({"decay": 0.9999}, lambda step: 0.9999),
    "warm-up": ({"decay": 0.99, "warmup": True}, lambda step: min(0.99, (1 + step) / (10 + step))),
    "half-life": ({"decay": None, "halflife_Mimg": 0.001}, lambda step: 0.5 ** (BATCH / 1000)),
}


@pytest.mark.parametrize("case", DECAYS)
def test_averages_are_those_of_float64(case: str) -> None:
    settings, decay = DECAYS[case]
    weights = walk(500, 60)
    flat = torch.zeros(60)
    start = flat.double().clone()
    ema = Ema(pieces_of(flat, [7, 21, 32]), config(**settings))
    expected = start
    for step in range(500):
        flat.copy_(weights[step])
        ema.update(step, BATCH)
        expected = decay(step) * expected + (1 - decay(step)) * weights[step].double()
    found = torch.cat(ema.averages["ema"])
    assert [tensor.numel() for tensor in ema.averages["ema"]] == [7, 21, 32]
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_pieces_apart_in_memory_are_averaged_alike() -> None:
    weights = walk(20, 30)
    whole, parts = torch.zeros(30), [torch.zeros(50)[3:13], torch.zeros(12)[:5], torch.zeros(15)]
    scattered = [Piece(f"p{i}", p.shape, 0, p, torch.zeros_like(p), torch.zeros_like(p)) for i, p in enumerate(parts)]
    settings = {"decay": 0.9, "power": [0.1]}
    one, other = Ema(pieces_of(whole, [10, 5, 15]), config(**settings)), Ema(scattered, config(**settings))
    for step in range(20):
        whole.copy_(weights[step])
        for part, values in zip(parts, weights[step].split([10, 5, 15]), strict=True):
            part.copy_(values)
        one.update(step, BATCH)
        other.update(step, BATCH)
    for label in ("ema", "power-0.100"):
        assert all(torch.equal(a, b) for a, b in zip(one.averages[label], other.averages[label], strict=True))


def test_averages_start_as_the_weights_and_can_be_set_to_them() -> None:
    flat = torch.arange(10.0)
    ema = Ema(pieces_of(flat, [4, 6]), config(decay=0.5, power=[0.05]))
    assert torch.equal(torch.cat(ema.averages["ema"]), flat)
    flat.mul_(2)
    ema.update(5, BATCH)
    assert torch.equal(torch.cat(ema.averages["ema"]), 1.5 * torch.arange(10.0))
    ema.reset()
    assert all(torch.equal(torch.cat(average), flat) for average in ema.averages.values())


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_the_exponent_gives_the_profile_its_relative_width(std: float) -> None:
    gamma = power_exponent(std)
    mean = quad(lambda x: (gamma + 1) * x**gamma * x, 0, 1)[0]
    variance = quad(lambda x: (gamma + 1) * x**gamma * (x - mean) ** 2, 0, 1)[0]
    assert math.sqrt(variance) == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("std", [0.05, 0.1])
def test_a_power_average_weighs_the_weights_by_its_profile(std: float) -> None:
    """Weights that are 1 at one step tell the weight of that step; over 400 steps it is the profile, sampled."""
    steps, gamma = 400, power_exponent(std)
    flat = torch.zeros(steps)
    ema = Ema(pieces_of(flat, [steps]), config(power=[std]))
    for step in range(steps):
        flat.zero_()
        flat[step] = 1.0
        ema.update(step, BATCH)
    weight = ema.averages[power_label(std)][0].double().numpy()
    edges = np.arange(steps + 1) / steps
    assert weight.sum() == pytest.approx(1.0, abs=1e-5)
    assert np.abs(weight - np.diff(edges ** (gamma + 1))).sum() < 0.03, "the share of each step's interval"


def test_inner_products_are_the_integrals() -> None:
    def profile(p: Profile, x: float) -> float:
        gamma = power_exponent(p.std)
        return (gamma + 1) * x**gamma / p.time ** (gamma + 1) if x <= p.time else 0.0

    for a in (Profile(3.0, 0.05), Profile(2.0, 0.2)):
        for b in (Profile(2.5, 0.1), Profile(2.0, 0.2)):
            expected = quad(lambda x, a=a, b=b: profile(a, x) * profile(b, x), 0, min(a.time, b.time))[0]
            assert inner_product(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_stored_profile_is_found_among_the_stored() -> None:
    stored = [Profile(time, std) for time in (100.0, 200.0, 300.0) for std in (0.05, 0.1)]
    found = coefficients(stored, Profile(200.0, 0.1))
    assert found == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-6)
    assert distance(stored, Profile(200.0, 0.1), found) < 1e-6


@pytest.mark.parametrize("std", [0.04, 0.075, 0.15])
def test_an_average_made_after_the_run_is_the_one_taken_in_it(std: float) -> None:
    steps, every = 2000, 200
    weights = walk(steps, 50)
    flat = torch.zeros(50)
    ema = Ema(pieces_of(flat, [50]), config(power=[0.05, 0.1, std]))
    stored: dict[Profile, Tensor] = {}
    for step in range(steps):
        flat.copy_(weights[step])
        ema.update(step, BATCH)
        if (step + 1) % every == 0:
            for kept in (0.05, 0.1):
                stored[Profile(step + 1.0, kept)] = ema.averages[power_label(kept)][0].double().clone()
    wanted = Profile(float(steps), std)
    shares = coefficients(list(stored), wanted)
    made = sum(float(share) * average for share, average in zip(shares, stored.values(), strict=True))
    taken = ema.averages[power_label(std)][0].double()
    nearest = stored[Profile(float(steps), 0.05 if std < 0.075 else 0.1)]
    error = float((made - taken).norm() / taken.norm())
    assert error < 0.01
    assert error < 0.2 * float((nearest - taken).norm() / taken.norm()), "far better than the nearest stored one"
