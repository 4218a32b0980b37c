"""The two processes against Bayes' rule, recursions and the paper's constants."""

import itertools
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion import continuous
from ddpm_dist.diffusion.gaussian import PREDICTIONS, VARIANCES, GaussianDiffusion
from ddpm_dist.diffusion.likelihood import prior_bits
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError

LINEAR = make_betas("linear", 1000)


def constant(value, dtype=torch.float64):
    return torch.full((1, 1, 1, 1), value, dtype=dtype)


def test_papers_constants():
    small, large = GaussianDiffusion(LINEAR, variance="fixedsmall"), GaussianDiffusion(LINEAR, variance="fixedlarge")
    assert small.posterior_variance[1] == pytest.approx(5.4532e-5, rel=1e-4)
    assert small.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)
    # Those of diffusers' own tests of DDPMScheduler: fixed_small at 487, fixed_large at 999.
    assert np.exp(small.fixed_log_variance[487]) == pytest.approx(0.00979, abs=5e-6)
    assert np.exp(large.fixed_log_variance[999]) == pytest.approx(0.02)
    assert np.exp(small.fixed_log_variance[0]) == pytest.approx(small.posterior_variance[1])
    assert np.exp(large.fixed_log_variance[0]) == pytest.approx(small.posterior_variance[1])
    assert np.exp(large.fixed_log_variance[1]) == pytest.approx(LINEAR[1])


def test_papers_prior_is_1e_5_bits():
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bits = prior_bits(GaussianDiffusion(LINEAR), x)
    assert bits.shape == (64,)
    assert 0.3e-5 < bits.mean() < 3e-5
    p = torch.distributions.Normal(0, 1)
    rest = 4.0358e-5
    q = torch.distributions.Normal(rest**0.5 * x.double(), (1 - rest) ** 0.5)
    expected = torch.distributions.kl_divergence(q, p).mean(dim=(1, 2, 3)) / np.log(2)
    torch.testing.assert_close(bits, expected, rtol=1e-3, atol=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-5, 0.99), min_size=1, max_size=40))
def test_single_steps_have_the_moments_of_the_closed_form(betas):
    diffusion = GaussianDiffusion(betas)
    mean, variance = constant(1.0), constant(0.0)
    for time in range(len(betas)):
        t = torch.tensor([time])
        mean = diffusion.q_step(mean, t, constant(0.0))
        scale = diffusion.q_step(constant(1.0), t, constant(0.0))
        variance = scale**2 * variance + diffusion.q_step(constant(0.0), t, constant(1.0)) ** 2
        closed_mean, closed_variance = diffusion.q_mean_variance(constant(1.0), t)
        torch.testing.assert_close(mean, closed_mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(variance, closed_variance, rtol=1e-9, atol=1e-12)
        sample = diffusion.q_sample(constant(1.0), t, constant(2.0))
        torch.testing.assert_close(sample, mean + 2 * variance.sqrt(), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    time=st.integers(1, 29),
    x_start=st.floats(-1, 1),
    x_t=st.floats(-2, 2),
    schedule=st.sampled_from(["linear", "cosine", "sigmoid_alpha_bar"]),
)
def test_posterior_is_bayes_rule(time, x_start, x_t, schedule):
    """q(x_{t-1} | x_t, x_0) as q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised on a grid."""
    diffusion = GaussianDiffusion(make_betas(schedule, 30, 0.01, 0.3))
    beta, before = diffusion.betas[time], diffusion.alphas_cumprod[time - 1]
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(
        constant(x_start), constant(x_t), torch.tensor([time])
    )
    mean, variance = mean.item(), variance.item()
    grid = mean + np.linspace(-12, 12, 4001) * np.sqrt(variance)
    log_density = -((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta) - (grid - np.sqrt(before) * x_start) ** 2 / (
        2 * (1 - before)
    )
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    found = (density * grid).sum()
    assert found == pytest.approx(mean, abs=1e-8)
    assert (density * (grid - found) ** 2).sum() == pytest.approx(variance, rel=1e-6)
    assert log_variance.exp().item() == pytest.approx(variance)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_predictions_round_trip_at_every_t(source, target, dtype, tolerance):
    """float32: at t = 999, x_start is 157 times eps, which is lost again in the way back; relative to its size."""
    diffusion = GaussianDiffusion(LINEAR)
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(1)
    value, x_t = (torch.randn(1000, 1, 2, 2, dtype=dtype, generator=generator) for _ in range(2))
    x_start = diffusion.to_x_start(value, x_t, t, source)
    there = diffusion.from_x_start(x_start, x_t, t, target)
    back = diffusion.from_x_start(diffusion.to_x_start(there, x_t, t, target), x_t, t, source)
    torch.testing.assert_close(back, value, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_means_the_image(prediction):
    diffusion = GaussianDiffusion(LINEAR, prediction)
    t = torch.arange(0, 1000, 9)
    generator = torch.Generator().manual_seed(1)
    x_start, eps = (torch.randn(len(t), 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x_t = diffusion.q_sample(x_start, t, eps)
    target = diffusion.target(x_start, x_t, t, eps)
    torch.testing.assert_close(diffusion.to_x_start(target, x_t, t), x_start, rtol=1e-9, atol=1e-9)
    reverse = diffusion.p_mean_variance(target, x_t, t)
    mean, _, _ = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    torch.testing.assert_close(reverse.mean, mean, rtol=1e-9, atol=1e-9)


def test_v_is_salimans_and_hos():
    diffusion = GaussianDiffusion(LINEAR, "v")
    t, x, eps = torch.tensor([300]), constant(0.7), constant(-1.1)
    angle = np.arctan2(diffusion.sqrt_one_minus_alphas_cumprod[300], diffusion.sqrt_alphas_cumprod[300])
    target = diffusion.target(x, diffusion.q_sample(x, t, eps), t, eps).item()
    assert target == pytest.approx(np.cos(angle) * -1.1 - np.sin(angle) * 0.7)


def test_mean_of_eps_is_the_papers_equation_11():
    diffusion = GaussianDiffusion(LINEAR)
    t, x_t, eps = torch.tensor([1, 500, 999]), torch.randn(3, 1, 2, 2).double(), torch.randn(3, 1, 2, 2).double()
    beta, rest = (torch.tensor(v)[t].reshape(3, 1, 1, 1) for v in (LINEAR, 1 - diffusion.alphas_cumprod))
    expected = (x_t - beta / rest.sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(diffusion.p_mean_variance(eps, x_t, t).mean, expected)


def test_clip_comes_before_the_mean():
    diffusion = GaussianDiffusion(LINEAR, "x_start")
    t, x_t = torch.tensor([100]), torch.zeros(1, 1, 1, 1)
    reverse = diffusion.p_mean_variance(torch.full((1, 1, 1, 1), 5.0), x_t, t, lambda x: x.clamp(-1, 1))
    assert reverse.x_start.item() == 1
    assert reverse.mean.item() == pytest.approx(diffusion.posterior_mean_coef1[100])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learned_range_reaches_from_the_posterior_to_beta(schedule):
    betas = make_betas(schedule, 1000)
    diffusion = GaussianDiffusion(betas, variance="learned_range")
    t, x_t = torch.arange(1, 1000, 50), torch.zeros(20, 1, 1, 1, dtype=torch.float64)
    for value, expected in ((-1, diffusion.posterior_variance), (1, betas)):
        output = torch.cat([x_t, torch.full_like(x_t, value)], dim=1)
        variance = diffusion.p_mean_variance(output, x_t, t).variance.flatten()
        np.testing.assert_allclose(variance, expected[1:1000:50], rtol=1e-9)


def test_learned_is_the_log_variance_itself():
    diffusion = GaussianDiffusion(LINEAR, variance="learned")
    output = torch.cat([torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -4.0)], dim=1)
    reverse = diffusion.p_mean_variance(output, torch.zeros(1, 3, 2, 2), torch.tensor([7]))
    assert (reverse.log_variance == -4).all()
    torch.testing.assert_close(reverse.variance, torch.full((1, 3, 2, 2), float(np.exp(-4))))


def test_network_in_bf16_leaves_the_state_in_float32():
    diffusion = GaussianDiffusion(LINEAR)
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([5, 900])
    reverse = diffusion.p_mean_variance(torch.randn(2, 3, 4, 4).bfloat16(), x_t, t)
    assert {v.dtype for v in reverse} == {torch.float32}
    assert diffusion.q_sample(x_t.bfloat16(), t, x_t).dtype == torch.float32


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance_in_bf16_is_widened_before_it_is_used(variance):
    diffusion = GaussianDiffusion(LINEAR, variance=variance)
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([5, 900])
    output = torch.randn(2, 6, 4, 4).bfloat16()
    low, wide = (diffusion.p_mean_variance(o, x_t, t) for o in (output, output.float()))
    assert {v.dtype for v in low} == {torch.float32}
    assert torch.equal(low.log_variance, wide.log_variance)


def test_constants_of_float64_images_are_float64_whatever_came_before():
    diffusion, t = GaussianDiffusion(LINEAR), torch.arange(1000)
    for dtype in (torch.float32, torch.float64, torch.float32):
        found = diffusion.at("alphas_cumprod", t, torch.zeros(1, dtype=dtype))
        assert found.dtype == dtype
        assert torch.equal(found, torch.tensor(diffusion.alphas_cumprod, dtype=dtype))


def test_zero_terminal_snr_with_v_finds_the_image_from_pure_noise():
    diffusion = GaussianDiffusion(make_betas("linear", 50, zero_terminal_snr=True), "v")
    x, eps, t = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), torch.tensor([49, 49])
    x_t = diffusion.q_sample(x, t, eps)
    assert torch.equal(x_t, eps)
    target = diffusion.target(x, x_t, t, eps)
    torch.testing.assert_close(diffusion.to_x_start(target, x_t, t), x)
    assert all(v.isfinite().all() for v in diffusion.p_mean_variance(target, x_t, t))


def test_constants_are_read_only_and_travel():
    diffusion = GaussianDiffusion(LINEAR, "v", "learned_range")
    with pytest.raises(ValueError, match="read-only"):
        diffusion.alphas_cumprod[0] = 2
    diffusion.at("betas", torch.tensor([1]), torch.zeros(1))
    other = pickle.loads(pickle.dumps(diffusion))
    assert (other.prediction, other.variance) == ("v", "learned_range")
    np.testing.assert_array_equal(other.betas, diffusion.betas)


def test_from_config():
    cfg = DiffusionConfig(timesteps=20, schedule="cosine", prediction="v", variance="learned_range", loss="hybrid")
    diffusion = GaussianDiffusion.from_config(cfg)
    assert (diffusion.timesteps, diffusion.prediction, diffusion.learns_variance) == (20, "v", True)
    np.testing.assert_array_equal(diffusion.betas, make_betas("cosine", 20))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 1e-3, "beta_end": 0.05},
        {"schedule": "given", "betas": (0.1, 0.2, 0.3)},
        {"schedule": "linear", "zero_terminal_snr": True, "prediction": "v"},
    ],
    ids=["ends", "given", "zero_terminal_snr"],
)
def test_every_setting_of_the_betas_is_heard(settings):
    cfg = DiffusionConfig(timesteps=3, **settings)
    chosen = {name: value for name, value in settings.items() if name != "prediction"}
    expected = make_betas(**{"schedule": "linear", "timesteps": 3, **chosen})
    np.testing.assert_array_equal(GaussianDiffusion.from_config(cfg).betas, expected)


@pytest.mark.parametrize("variance", VARIANCES)
def test_every_variance_is_heard(variance):
    loss = "hybrid" if "learned" in variance else "simple"
    assert GaussianDiffusion.from_config(DiffusionConfig(variance=variance, loss=loss)).variance == variance


def test_names_are_the_configurations():
    fields = DiffusionConfig.model_fields
    assert set(get_args(fields["prediction"].annotation)) == {*PREDICTIONS, *continuous.PREDICTIONS}
    assert get_args(fields["variance"].annotation) == VARIANCES


def test_one_timestep():
    diffusion = GaussianDiffusion([0.5])
    t, x = torch.tensor([0]), torch.zeros(1, 1, 1, 1)
    assert all(v.isfinite().all() for v in diffusion.p_mean_variance(x, x, t))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prediction": "noise"}, "prediction: 'noise' is unknown; choose from eps"),
        ({"variance": "fixed"}, "variance: 'fixed' is unknown; choose from fixedsmall"),
        ({"betas": make_betas("linear", 9, zero_terminal_snr=True)}, "eps says nothing about x_start"),
        ({"betas": []}, "expected a list of numbers"),
        ({"betas": [[0.1]]}, "expected a list of numbers"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ConfigError, match=words):
        GaussianDiffusion(**{"betas": LINEAR, **arguments})


def test_network_that_learned_no_variance_is_refused():
    diffusion = GaussianDiffusion(LINEAR, variance="learned_range")
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"gives 3 channels for images of 3, but .* learned_range needs 6"):
        diffusion.p_mean_variance(x, x, torch.tensor([0]))
