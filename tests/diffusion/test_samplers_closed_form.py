"""Samplers on data whose exact eps is known: moments, the ODE's solution, and the order of convergence."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import torch

from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, trajectory
from ddpm_dist.diffusion.schedules import make_betas

MEAN, DEVIATION = 0.4, 0.5
STOCHASTIC = ("ddpm", "ddim", "dpmpp_2m_sde")
COUNT = 4000


class Mixture:
    """The exact prediction for pixels that are each a mixture of Gaussians; in float64 inside."""

    def __init__(self, diffusion, means, deviations, shares):
        self.diffusion = diffusion
        self.means, self.deviations, self.shares = (
            torch.tensor(v, dtype=torch.float64) for v in (means, deviations, shares)
        )

    def __call__(self, x, t, labels=None):
        x = x.double()
        signal = self.diffusion.at("sqrt_alphas_cumprod", t, x)[..., None]
        variance = signal**2 * self.deviations**2 + 1 - signal**2
        error = x[..., None] - signal * self.means
        responsibility = torch.softmax(self.shares.log() - 0.5 * error**2 / variance - 0.5 * variance.log(), dim=-1)
        x_start = (responsibility * (self.means + signal * self.deviations**2 / variance * error)).sum(dim=-1)
        return self.diffusion.from_x_start(x_start, x, t, self.diffusion.prediction)


def gaussian(diffusion):
    return Mixture(diffusion, [MEAN], [DEVIATION], [1.0])


def final(network, diffusion, count=COUNT, **settings):
    """x_0 of `count` images of 4 pixels, [count, 4] float64."""
    settings = SamplingConfig(clip="none", **settings)
    steps = trajectory(network, diffusion, settings, seed=11, indices=torch.arange(count), shape=(1, 2, 2))
    *_, last = steps
    return last.x.reshape(count, 4).double()


def options(sampler):
    return {"eta": 1.0} if sampler == "ddim" else {}


def steps_of(sampler):
    """The ancestral chain is exact as its steps get small; the others with few."""
    return {"ddpm": None, "ddim": 200, "euler": 200, "dpmpp_2m_sde": 100}.get(sampler, 50)


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [*((s, "eps") for s in SAMPLERS), ("ddpm", "x_start"), ("heun", "v"), ("unipc", "x_start")],
)
def test_gaussian_data_has_its_mean_and_covariance(sampler, prediction):
    """Bounds: five standard errors of 4,000 images, plus 1 % of the deviation for the discretisation."""
    diffusion = GaussianDiffusion(make_betas("linear", 1000), prediction, "fixedsmall")
    x = final(
        gaussian(diffusion), diffusion, sampler=sampler, steps=steps_of(sampler), spacing="trailing", **options(sampler)
    )
    variance = DEVIATION**2
    assert (x.mean(dim=0) - MEAN).abs().max() < 5 * DEVIATION / math.sqrt(COUNT) + 0.01 * DEVIATION
    covariance = torch.cov(x.T)
    bound = 5 * variance * math.sqrt(2 / COUNT) + 0.02 * variance
    assert (covariance - variance * torch.eye(4)).abs().max() < bound


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge"])
def test_ancestral_variances_meet_where_the_data_are_known(variance):
    """Sohl-Dickstein et al. 2015: fixedlarge is exact for N(0, I) data, fixedsmall for a single image."""
    deviation = 1.0 if variance == "fixedlarge" else 1e-3
    diffusion = GaussianDiffusion(make_betas("linear", 100, 1e-4, 0.2), "x_start", variance)
    x = final(Mixture(diffusion, [0.0], [deviation], [1.0]), diffusion, sampler="ddpm")
    if variance == "fixedlarge":
        assert x.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / (4 * COUNT)) + 0.01)
    else:
        assert x.std().item() < 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mixture_of_two_has_its_shares_means_and_widths(sampler):
    diffusion = GaussianDiffusion(make_betas("cosine", 1000), "v", "fixedsmall")
    network = Mixture(diffusion, [-0.6, 0.5], [0.1, 0.2], [0.3, 0.7])
    x = final(network, diffusion, sampler=sampler, steps=steps_of(sampler), spacing="trailing", **options(sampler))
    x = x.flatten()
    upper = x > -0.25
    n = len(x)
    assert upper.double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / n) + 0.01)
    for part, mean, width in ((x[upper], 0.5, 0.2), (x[~upper], -0.6, 0.1)):
        assert part.mean().item() == pytest.approx(mean, abs=5 * width / math.sqrt(0.3 * n) + 0.01)
        assert part.std().item() == pytest.approx(width, rel=5 / math.sqrt(0.6 * n) + 0.03)


def exact_flow(network, log_ratio_from, log_ratio_to, x):
    """Solution of d(x/alpha) = eps d(sigma/alpha) by scipy, between two values of log(sigma / alpha)."""
    means, deviations, shares = (v.numpy() for v in (network.means, network.deviations, network.shares))

    def eps(log_ratio, scaled):
        ratio = np.exp(log_ratio)
        variance = deviations**2 + ratio**2
        error = scaled[:, None] - means
        weight = shares * np.exp(-0.5 * error**2 / variance) / np.sqrt(variance)
        return ratio * (weight * error / variance).sum(axis=1) / weight.sum(axis=1)

    scaled = x * np.sqrt(1 + np.exp(2 * log_ratio_from))
    solution = scipy.integrate.solve_ivp(
        lambda log_ratio, y: np.exp(log_ratio) * eps(log_ratio, y),
        (log_ratio_from, log_ratio_to),
        scaled,
        method="DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    return solution.y[:, -1] / np.sqrt(1 + np.exp(2 * log_ratio_to))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2), ("unipc", 4)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    """The error of x_t three quarters of the way, on a mixture, as the steps double from 32 to 128.

    UniPC's corrector adds one to its predictor's order of 3 (Zhao et al. 2023, theorem 3.1).
    The log-SNR falls evenly from 5 to -5, so that the errors stand far above float32's.
    """
    timesteps = 8192
    log_ratio = np.linspace(-2.5, 2.5, timesteps)
    alphas_cumprod = 1 / (1 + np.exp(2 * log_ratio))
    diffusion = GaussianDiffusion(1 - alphas_cumprod / np.append(1, alphas_cumprod[:-1]), "v")
    network = Mixture(diffusion, [-0.6, 0.5], [0.3, 0.4], [0.3, 0.7])
    x_T = torch.linspace(-2, 2, 32, dtype=torch.float64)
    t_to = timesteps // 4 - 1
    exact = exact_flow(network, log_ratio[-1], log_ratio[t_to], x_T.numpy())
    # The fourth order's errors soon meet float32's.
    counts, errors = (48, 72) if order == 4 else (32, 64, 128), []
    for steps in counts:
        settings = SamplingConfig(sampler=sampler, steps=steps, spacing="trailing", clip="none")
        start = x_T.float().reshape(32, 1, 1, 1)
        chain = trajectory(network, diffusion, settings, seed=0, indices=torch.arange(32), shape=(1, 1, 1), x_T=start)
        *_, last = itertools.takewhile(lambda step: step.t != t_to, chain)
        errors.append(np.abs(last.x.flatten().double().numpy() - exact).max())
    orders = np.diff(-np.log(errors)) / np.diff(np.log(counts))
    assert orders.mean() == pytest.approx(order, abs=0.35), (errors, orders)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_20_evaluations_suffice_with_log_snr_spacing(sampler, schedule):
    """Mean error of x_0 against the exact flow of a mixture; DDIM's is 0.047, and trailing spacing's 0.015 to 0.035."""
    diffusion = GaussianDiffusion(make_betas(schedule, 1000), "v")
    network = Mixture(diffusion, [-0.6, 0.5], [0.3, 0.2], [0.3, 0.7])
    x_T = torch.distributions.Normal(0, 1).icdf((torch.arange(200) + 0.5) / 200).reshape(200, 1, 1, 1)
    exact = exact_flow(network, -0.5 * math.log(diffusion.snr[-1]), -9.0, x_T.flatten().double().numpy())
    settings = SamplingConfig(sampler=sampler, steps=20, spacing="log_snr", clip="none")
    *_, last = trajectory(network, diffusion, settings, seed=0, indices=torch.arange(200), shape=(1, 1, 1), x_T=x_T)
    assert np.abs(last.x.flatten().double().numpy() - exact).mean() < 0.01


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "unipc"])
def test_deterministic_samplers_reach_the_exact_image(sampler):
    """The whole way to x_0 on the paper's schedule: within 1 % of the deviation at all 1,000 steps."""
    diffusion = GaussianDiffusion(make_betas("linear", 1000))
    settings = SamplingConfig(sampler=sampler, clip="none")
    x_T = torch.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
    *_, last = trajectory(
        gaussian(diffusion), diffusion, settings, seed=0, indices=torch.arange(9), shape=(1, 1, 1), x_T=x_T
    )
    signal = diffusion.sqrt_alphas_cumprod[-1]
    start = np.sqrt(signal**2 * DEVIATION**2 + 1 - signal**2)
    exact = MEAN + (x_T.double() - MEAN * signal) / start * DEVIATION
    assert (last.x - exact).abs().max() < 0.01 * DEVIATION


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v", "x_start", "x_prev"])
def test_zero_terminal_snr(sampler, prediction):
    """Every sampler starts from pure noise and still finds the data; first time and last are its hard ends."""
    betas = make_betas("linear", 1000, zero_terminal_snr=True)
    diffusion = GaussianDiffusion(betas, prediction, "fixedsmall")
    x = final(gaussian(diffusion), diffusion, 1000, sampler=sampler, steps=100, spacing="trailing", **options(sampler))
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * DEVIATION / math.sqrt(4000) + 0.01)
    assert x.std().item() == pytest.approx(DEVIATION, rel=5 / math.sqrt(8000) + 0.04)
