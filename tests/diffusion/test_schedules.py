"""Schedules against diffusers' and against the papers' formulas."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings, strategies as st

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.schedules import SCHEDULES, make_betas
from ddpm_dist.errors import ConfigError

THEIR_NAME = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "quadratic": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


@pytest.mark.parametrize("name", THEIR_NAME)
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_equals_diffusers(name, timesteps):
    theirs = DDPMScheduler(timesteps, beta_start=2e-4, beta_end=0.03, beta_schedule=THEIR_NAME[name]).betas
    ours = make_betas(name, timesteps, 2e-4, 0.03)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=3e-5)  # theirs are float32


def test_sigmoid_alpha_bar_is_jabris():
    """The formula as in lucidrains' library, in torch."""
    t = torch.linspace(0, 1000, 1001, dtype=torch.float64) / 1000
    start, end = torch.tensor(-3.0).sigmoid().double(), torch.tensor(3.0).sigmoid().double()
    alphas_cumprod = (-((t * 6 - 3).sigmoid()) + end) / (end - start)
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    betas = torch.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    np.testing.assert_allclose(make_betas("sigmoid_alpha_bar", 1000), betas, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "cosine"])
def test_zero_terminal_snr_equals_diffusers(name):
    plain = make_betas(name, 100, 1e-3, 0.05)
    ours = make_betas(name, 100, 1e-3, 0.05, zero_terminal_snr=True)
    np.testing.assert_allclose(ours, rescale_zero_terminal_snr(torch.tensor(plain)), rtol=1e-9)
    assert ours[-1] == 1
    assert np.cumprod(1 - ours)[-1] == 0
    assert ours[0] == pytest.approx(plain[0])


def test_papers_constants():
    betas = make_betas("linear", 1000, 1e-4, 0.02)
    assert np.prod(1 - betas) == pytest.approx(4.036e-5, rel=1e-3)
    assert betas[0] == 1e-4
    assert betas[999] == 0.02


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(SCHEDULES)), timesteps=st.integers(1, 500), zero=st.booleans())
def test_betas_are_variances(name, timesteps, zero):
    if zero and timesteps == 1:
        return
    betas = make_betas(name, timesteps, zero_terminal_snr=zero)
    assert betas.shape == (timesteps,)
    assert (betas > 0).all()
    assert (betas[:-1] < 1).all()
    assert (betas[-1] == 1) == zero


def test_given_is_taken_as_it_is():
    assert make_betas("given", 3, betas=[0.1, 0.2, 0.3]).tolist() == [0.1, 0.2, 0.3]


def test_every_name_of_the_configuration_exists():
    names = get_args(DiffusionConfig.model_fields["schedule"].annotation)
    assert set(names) == {*SCHEDULES, "given"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "cosin", "timesteps": 10}, "schedule: 'cosin' is unknown; choose from linear"),
        ({"schedule": "linear", "timesteps": 0}, "timesteps: 0"),
        ({"schedule": "linear", "timesteps": 10, "beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"schedule": "given", "timesteps": 3, "betas": [0.1]}, "1 values for 3"),
        ({"schedule": "given", "timesteps": 2, "betas": [0.1, 1.5]}, r"beta\[1\] is 1.5"),
        ({"schedule": "given", "timesteps": 2, "betas": [1.0, 0.5]}, r"beta\[0\] is 1.0"),
        ({"schedule": "given", "timesteps": 2, "betas": [0.1, math.nan]}, r"beta\[1\] is nan"),
        ({"schedule": "linear", "timesteps": 1, "zero_terminal_snr": True}, "at least 2"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make_betas(**arguments)


def test_the_signal_may_not_vanish():
    """1 / sqrt(alpha_bar) overflows float32 from about 17,500 times on with the paper's ends."""
    assert len(make_betas("linear", 17_000)) == 17_000
    for zero in (False, True):
        with pytest.raises(ConfigError, match=r"diffusion\.timesteps: 100000 .* too many: from t = \d+ on"):
            make_betas("linear", 100_000, zero_terminal_snr=zero)
    assert len(make_betas("linear", 100_000, 1e-6, 2e-4)) == 100_000
    with pytest.raises(ConfigError, match=r"beta\[0\] is 1e-18.*not vanish beside 1"):
        make_betas("given", 2, betas=[1e-18, 0.1])
