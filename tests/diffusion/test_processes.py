"""Paths and processes where all is known: a mixture of two Gaussians, on a table of betas, EDM's path and a flow's."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import torch

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig, SamplingConfig
from ddpm_dist.diffusion import continuous, path as paths
from ddpm_dist.diffusion.continuous import ContinuousDiffusion, make_process
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.losses import training_losses
from ddpm_dist.diffusion.ode import integrate, log_likelihood, velocity
from ddpm_dist.diffusion.path import PREDICTIONS, Exploding, Straight, Table
from ddpm_dist.diffusion.samplers import SAMPLERS, sample, trajectory
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError, SamplingError

MEANS, DEVIATIONS, SHARES = (-0.6, 0.5), (0.3, 0.2), (0.3, 0.7)
PATHS = {
    "table": Table(np.cumprod(1 - make_betas("linear", 1000))),
    "zero terminal": Table(np.cumprod(1 - make_betas("cosine", 1000, zero_terminal_snr=True))),
    "edm": Exploding(),
    "flow": Straight(),
}
PROCESSES = {
    "ddpm": lambda prediction=None: GaussianDiffusion(make_betas("linear", 1000), prediction or "eps", "fixedsmall"),
    "edm": lambda prediction=None: ContinuousDiffusion("edm", prediction, "fixedsmall"),
    "flow": lambda prediction=None: ContinuousDiffusion("flow", prediction, "fixedsmall"),
}
CONTINUOUS = ("edm", "flow")


def times(diffusion, count=64):
    """Over the whole path: [count] tensor, as the process has them."""
    first, last = diffusion.path.first, diffusion.path.last
    if diffusion.discrete:
        return torch.linspace(first, last, count).long()
    spread = torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64)
    return spread.clamp(max=0.999) if last == 1 else spread


def density(x, alpha, sigma):
    """log p_t(x), elementwise, of the mixture's pixels at a level."""
    found = []
    for mean, deviation, share in zip(MEANS, DEVIATIONS, SHARES, strict=True):
        variance = alpha**2 * deviation**2 + sigma**2
        found.append(
            math.log(share) - 0.5 * (x - alpha * mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)
        )
    return torch.logsumexp(torch.stack(found), dim=0)


def denoise(x, alpha, sigma):
    """E[x_0 | x_t], elementwise."""
    means, deviations, shares = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, DEVIATIONS, SHARES))
    x, alpha, sigma = (torch.as_tensor(v, dtype=torch.float64)[..., None] for v in (x, alpha, sigma))
    variance = alpha**2 * deviations**2 + sigma**2
    error = x - alpha * means
    weight = torch.softmax(shares.log() - 0.5 * error**2 / variance - 0.5 * variance.log(), dim=-1)
    return (weight * (means + alpha * deviations**2 / variance * error)).sum(dim=-1)


class Exact:
    """The network that knows the mixture, as the process asks it."""

    def __init__(self, diffusion):
        self.diffusion = diffusion

    def __call__(self, x, told, labels=None):
        d, x = self.diffusion, x.double()
        t = told
        if not d.discrete:
            t = torch.exp(4 * told.double()) if d.name == "edm" else told.double() / 1000
        if not d.discrete and d.name == "edm":
            x = x * (t**2 + d.sigma_data**2).sqrt().reshape(-1, 1, 1, 1)
        alpha, sigma = (v.expand_as(x) for v in d.pair("scales", t, x))
        return d.from_x_start(denoise(x, alpha, sigma), x, t, d.prediction)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_smooth_and_falls_from_image_to_noise(name):
    """Derivatives against differences; the inverse of the ratio; both ends."""
    path = PATHS[name]
    t = np.linspace(path.first, path.last, 999)[1:-1] + 0.3 * (path.origin < 0)
    t = t[t < path.last]
    level, h = path.level(t), 1e-5 * (1 if path.last > 1 else 1e-2)
    after, before = path.level(t + h), path.level(t - h)
    assert np.allclose((after.alpha - before.alpha) / (2 * h), level.d_alpha, rtol=1e-5, atol=1e-9)
    assert np.allclose((after.sigma - before.sigma) / (2 * h), level.d_sigma, rtol=1e-5, atol=1e-9)
    assert np.allclose(path.time_of(level.sigma / level.alpha), t, rtol=1e-9, atol=1e-9)
    assert (np.diff(path.log_snr(t)) < 0).all()
    start = path.level(np.array([path.origin]))
    assert (start.alpha, start.sigma) == (1, 0)


def test_the_papers_table_is_an_instance():
    """At whole times the table's alpha and sigma, between them the same circle; and no signal where there is none."""
    betas = make_betas("linear", 1000)
    level = PATHS["table"].level(np.arange(1000.0))
    assert np.allclose(level.alpha, np.sqrt(np.cumprod(1 - betas)), rtol=0, atol=1e-14)
    assert np.allclose(level.sigma, np.sqrt(1 - np.cumprod(1 - betas)), rtol=0, atol=1e-12)
    between = PATHS["table"].level(np.linspace(-1, 999, 3777))
    assert np.allclose(between.alpha**2 + between.sigma**2, 1, atol=1e-15)
    assert PATHS["zero terminal"].level(np.array([999.0])).alpha[0] == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_predictions_convert_into_one_another(name, prediction):
    """In float64 there and back; of known noise, and of x_t alone."""
    d = PROCESSES[name]()
    t = times(d)
    generator = torch.Generator().manual_seed(0)
    x_start, eps = torch.randn(2, len(t), 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t = d.q_sample(x_start, t, eps)
    value = d.from_x_start(x_start, x_t, t, prediction, eps)
    scale = d.pair("x_start", t, x_t, prediction)[1].abs() * value.abs() + 1
    assert ((d.to_x_start(value, x_t, t, prediction) - x_start).abs() / scale).max() < 1e-12
    again = d.from_x_start(x_start, x_t, t, prediction)
    assert ((again - value).abs() / (value.abs() + 1)).max() < 1e-8
    weights = d.weights(t.numpy(), prediction)
    assert np.allclose(weights[0], d.pair("x_start", t, x_t, prediction)[0].flatten(), rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_denoiser_score_and_velocity_are_one_function(name):
    """The denoiser's score is the density's gradient, and along its velocity every quantile stays itself."""
    d = PROCESSES[name]()
    t = times(d, 16)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).repeat(len(t), 1).reshape(len(t), 1, 4, 4)
    alpha, sigma = (v.expand_as(x) for v in d.pair("scales", t, x))
    x = (x * (alpha**2 + sigma**2).sqrt()).requires_grad_()
    (score,) = torch.autograd.grad(density(x, alpha, sigma).sum(), x)
    x = x.detach()
    x_start = denoise(x, alpha, sigma)
    assert torch.allclose(d.from_x_start(x_start, x, t, "score"), score, rtol=1e-6, atol=1e-9)
    assert torch.allclose(d.to_x_start(score, x, t, "score"), x_start, atol=1e-8)
    if d.discrete:
        return  # its velocity has a kink at every whole time; the samplers' tests follow the flow
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for time in (0.05, 0.5):
        level = d.path.level(torch.tensor(time, dtype=torch.float64))
        x = grid * (level.alpha**2 + level.sigma**2).sqrt()
        mass = torch.cumulative_trapezoid(density(x, level.alpha, level.sigma).exp(), x)
        times_ = torch.full((len(x),), time, dtype=torch.float64)
        points = x.reshape(-1, 1, 1, 1)
        start = denoise(x, level.alpha, level.sigma).reshape(points.shape)
        v = d.from_x_start(start, points, times_, "velocity").flatten()
        h = 1e-4
        later = d.path.level(torch.tensor(time + h, dtype=torch.float64))
        moved = x + h * v
        there = torch.cumulative_trapezoid(density(moved, later.alpha, later.sigma).exp(), moved)
        assert (mass - there).abs().max() < 20 * h**2


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [*((s, None) for s in SAMPLERS), *(("heun", p) for p in ("edm", "x_start", "v", "velocity"))],
)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_sampler_finds_the_data_on_a_continuous_path(name, sampler, prediction):
    """Mean and deviation of 4,000 pixels within five standard errors and the discretisation's 2 %."""
    d = PROCESSES[name](prediction)
    spacing = "rho" if name == "edm" or sampler in ("dpmpp_2m", "unipc") else "trailing"
    settings = SamplingConfig(
        sampler=sampler, steps=100, spacing=spacing, clip="none", eta=1.0 if sampler == "ddim" else None
    )
    steps = trajectory(Exact(d), d, settings, seed=5, indices=torch.arange(1000), shape=(1, 2, 2))
    *_, last = steps
    mean = sum(s * m for s, m in zip(SHARES, MEANS, strict=True))
    square = sum(s * (m**2 + w**2) for s, m, w in zip(SHARES, MEANS, DEVIATIONS, strict=True))
    deviation = math.sqrt(square - mean**2)
    assert last.x.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(4000))
    assert last.x.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ddim_with_eta_1_is_the_ancestral_chain(name):
    """Song et al. 2020, section 4.1, on any path: of the posterior's variance, fixedsmall."""
    d = PROCESSES[name]()
    common = {"steps": 12, "spacing": "rho", "clip": "none"}
    chains = [
        list(
            trajectory(Exact(d), d, SamplingConfig(**common, **which), seed=5, indices=torch.arange(9), shape=(1, 2, 2))
        )
        for which in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddim"})
    ]
    ancestral, stochastic, still = (torch.stack([step.x for step in chain]) for chain in chains)
    scale = ancestral.abs().amax(dim=(1, 2, 3, 4), keepdim=True)
    assert ((ancestral - stochastic) / scale).abs().max() < 1e-5
    assert ((ancestral - still) / scale).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "sampler", "order"),
    [("edm", "euler", 1), ("edm", "heun", 2), ("edm", "dpmpp_2m", 2), ("edm", "unipc", 4),
     ("flow", "euler", 1), ("flow", "heun", 2), ("flow", "dpmpp_2m", 2)],
)  # fmt: skip
def test_samplers_converge_at_their_order_on_any_path(name, sampler, order):
    """Against the adaptive reference, three quarters of the way from sigma / alpha of e^2 down to e^-2."""
    d = PROCESSES[name]()
    d.path.first, d.path.last = (float(d.path.time_of(math.exp(v))) for v in (-2.0, 2.0))
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(16, 1, 1, 1) * float(d.path.level(d.path.last).sigma)
    counts, errors = (32, 48) if order == 4 else (33, 65), []
    for steps in counts:
        settings = SamplingConfig(sampler=sampler, steps=steps, spacing="log_snr", clip="none")
        chain = list(
            trajectory(Exact(d), d, settings, seed=0, indices=torch.arange(16), shape=(1, 1, 1), x_T=x.float())
        )
        k = (steps * 3) // 4 - 1
        exact, _ = integrate(velocity(Exact(d), d), x.float().double(), d.path.last, chain[k + 1].t, 1e-8, 1e-8)
        errors.append((chain[k].x - exact).abs().max().item())
    found = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert found.mean() == pytest.approx(order, abs=0.4), (errors, found)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_likelihood_of_the_ode_is_the_densitys(name):
    """Of a mixture: the prior at EDM's last time leaves the data's mean out, which shifts log p by up to 2e-2."""
    d = PROCESSES[name]()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 1, 1, 2)
    one, zero = torch.ones_like(x), torch.full_like(x, 1e-9)
    exact = density(x, one, zero).flatten(1).sum(dim=1)
    for probes in (1, 2):  # pixels are independent here, so every probe is exact
        found = log_likelihood(Exact(d), d, x, seed=0, indices=torch.arange(6), probes=probes, tolerance=1e-6)
        assert (found - exact).abs().max() < (2e-2 if name == "edm" else 1e-3)


def test_the_reference_solver_agrees_with_scipys():
    def field(t, y):
        return torch.sin(3 * y) + math.cos(t)

    y = torch.linspace(-1, 1, 5, dtype=torch.float64)
    found, evaluations = integrate(field, y, 2.0, -1.0, 1e-9, 1e-9)
    scipys = scipy.integrate.solve_ivp(
        lambda t, y: np.sin(3 * y) + np.cos(t), (2, -1), y.numpy(), method="RK45", rtol=1e-10, atol=1e-10
    )
    assert np.allclose(found, scipys.y[:, -1], atol=1e-7)
    assert evaluations < scipys.nfev
    with pytest.raises(SamplingError, match="finite"):
        integrate(lambda t, y: y * math.nan, y, 0.0, 1.0)


# Against direct rewritings of what is published


def network(x, noise, labels=None):
    """Smooth in both, and of no closed form."""
    return torch.sin(2 * x + noise.reshape(-1, 1, 1, 1).to(x.dtype)) * 0.7


def test_edms_loss_is_table_1s():
    """NVlabs' EDMLoss: weight (sigma² + sd²) / (sigma sd)² on the denoiser's error, log-normal sigma."""
    d = make_process(DiffusionConfig(process="edm"))
    sd, generator = 0.5, torch.Generator().manual_seed(1)
    y, n = torch.randn(2, 8, 3, 4, 4, generator=generator)
    sigma = (torch.randn(8, generator=generator) * 1.2 - 1.2).exp().double()
    s = sigma.float().reshape(-1, 1, 1, 1)
    x = y + n * s
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    c_in, c_noise = 1 / (sd**2 + s**2).sqrt(), s.log() / 4
    denoised = c_skip * x + c_out * network(c_in * x, c_noise)
    theirs = ((s**2 + sd**2) / (s * sd) ** 2 * (denoised - y) ** 2).flatten(1).mean(dim=1)
    ours = training_losses(d, network, y, sigma, n, None, DiffusionConfig(process="edm")).loss
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("churn", [0.0, 30.0])
def test_edms_sampler_is_algorithm_2(churn):
    """NVlabs' edm_sampler, line for line, in float32; with the noise of our purposes."""
    d = ContinuousDiffusion("edm")
    steps, low, high, noise_scale, sd = 18, 0.01, 10.0, 1.007, 0.5
    settings = SamplingConfig(
        sampler="heun", steps=steps, spacing="rho", clip="none", churn=churn,
        **({"churn_interval": (low, high), "churn_noise": noise_scale} if churn else {}),
    )  # fmt: skip
    shape, indices = (3, 4, 4), torch.arange(3)

    def denoiser(x, sigma):
        s = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
        return c_skip * x + c_out * network(x / (sd**2 + s**2).sqrt(), (s.log() / 4).expand(len(x)))

    ramp = np.arange(steps) / (steps - 1)
    sigmas = np.append((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
    x_next = rng.normal(3, rng.Purpose.X_T, indices, shape).double() * sigmas[0]
    for i, (t_cur, t_next) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t_cur <= high else 0
        t_hat = t_cur + gamma * t_cur
        noise = rng.normal(3, rng.Purpose.REVERSE, indices, shape, step=i).double()
        x_hat = x_next + math.sqrt(t_hat**2 - t_cur**2) * noise_scale * noise
        d_cur = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t_next - t_hat) * d_cur
        if i < steps - 1:
            d_prime = (x_next - denoiser(x_next, t_next)) / t_next
            x_next = x_hat + (t_next - t_hat) * (0.5 * d_cur + 0.5 * d_prime)
    *_, last = trajectory(network, d, settings, seed=3, indices=indices, shape=shape)
    assert (last.x - x_next).abs().max() < 2e-6 * max(1.0, x_next.abs().max().item())


def test_flows_loss_and_sampler_are_the_published_ones():
    """X_t = t X_1 + (1 - t) X_0 with data X_1, target X_1 - X_0, Euler from 0 to 1; time is reversed here."""
    cfg = DiffusionConfig(process="flow")
    d, generator = make_process(cfg), torch.Generator().manual_seed(1)
    x_1, x_0 = torch.randn(2, 8, 3, 4, 4, generator=generator)
    t = torch.rand(8, generator=generator, dtype=torch.float64)
    s = t.float().reshape(-1, 1, 1, 1)
    x_t = s * x_1 + (1 - s) * x_0
    theirs = ((-network(x_t, (1000 * (1 - t)).float()) - (x_1 - x_0)) ** 2).flatten(1).mean(dim=1)
    ours = training_losses(d, network, x_1, 1 - t, x_0, None, cfg).loss
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    steps, x = 20, x_0.double()
    for k in range(steps):
        here = torch.full((8,), k / steps, dtype=torch.float64)
        x = x + -network(x, 1000 * (1 - here)) / steps
    settings = SamplingConfig(sampler="euler", steps=steps, spacing="trailing", clip="none")
    *_, last = trajectory(network, d, settings, seed=0, indices=torch.arange(8), shape=(3, 4, 4), x_T=x_0)
    assert (last.x - x).abs().max() < 2e-6 * max(1.0, x.abs().max().item())


def test_a_process_that_makes_none_is_refused():
    with pytest.raises(ConfigError, match="edm, flow"):
        ContinuousDiffusion("vp")
    with pytest.raises(ConfigError, match="use one of edm, velocity, v, x_start"):
        ContinuousDiffusion("flow", "eps")
    with pytest.raises(ConfigError, match="fixedsmall or fixedlarge"):
        ContinuousDiffusion("edm", variance="learned_range")
    with pytest.raises(ConfigError, match="0 < sigma_min < sigma_max"):
        ContinuousDiffusion("edm", sigma_min=3.0, sigma_max=2.0)
    with pytest.raises(ConfigError, match=r"sampling.steps: None; this process is continuous"):
        sample(network, ContinuousDiffusion("edm"), SamplingConfig(), seed=0, indices=torch.arange(1), shape=(1, 2, 2))
    assert set(continuous.PROCESSES) == {"ddpm", "edm", "flow"}
    assert set(paths.PREDICTIONS) >= set(continuous.PREDICTIONS)
