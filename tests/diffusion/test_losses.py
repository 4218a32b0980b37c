"""Losses against torch.distributions, scipy and the published weight formulas."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.gaussian import PREDICTIONS, GaussianDiffusion
from ddpm_dist.diffusion.losses import (
    discretized_gaussian_log_likelihood,
    drop_labels,
    loss_weight,
    normal_kl,
    training_losses,
    vlb_term,
)
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.diffusion.times import draw_t

T = 1000
BETAS = make_betas("linear", T)


def batch(size=6, channels=3):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randint(0, 256, (size, channels, 4, 4), generator=generator) / 127.5 - 1).float()
    eps = torch.randn(x.shape, generator=generator)
    t = torch.tensor([0, 1, 10, 400, 800, 999])[:size]
    return x, eps, t, torch.randn(x.shape, generator=generator)


def test_simple_is_equation_14():
    x, eps, t, answer = batch()
    diffusion = GaussianDiffusion(BETAS)
    seen = []

    def network(x_t, time, labels):
        seen.append((x_t, time, labels))
        return answer

    labels = torch.arange(6)
    losses = training_losses(diffusion, network, x, t, eps, labels, DiffusionConfig())
    torch.testing.assert_close(losses.loss, ((eps - answer) ** 2).mean(dim=(1, 2, 3)))
    ((x_t, time, given),) = seen
    a = torch.tensor(np.cumprod(1 - BETAS))[t].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), a.sqrt() * x + (1 - a).sqrt() * eps, rtol=1e-5, atol=1e-6)
    assert torch.equal(time, t)
    assert given is labels


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_weighted_loss_is_one_number_for_every_prediction(weighting):
    """The same estimate of x_start, said as eps, x_start, v or x_prev, has the same weighted loss."""
    x, eps, t, answer = (v.double() if v.is_floating_point() else v for v in batch())
    cfg = DiffusionConfig(weighting=weighting, p2_gamma=0.5)
    found = []
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(BETAS, prediction)

        def network(x_t, time, labels, diffusion=diffusion):
            return diffusion.from_x_start(answer, x_t, time, diffusion.prediction)

        found.append(training_losses(diffusion, network, x, t, eps, None, cfg).loss)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("prediction", "weighting", "expected"),
    [
        ("eps", "min_snr", lambda snr: np.minimum(snr, 5) / snr),
        ("x_start", "min_snr", lambda snr: np.minimum(snr, 5)),
        ("v", "min_snr", lambda snr: np.minimum(snr, 5) / (snr + 1)),
        ("eps", "p2", lambda snr: 1 / (1 + snr)),
        ("x_start", "p2", lambda snr: snr / (1 + snr)),
        ("eps", "none", lambda snr: np.ones_like(snr)),
    ],
)
def test_weights_are_the_published_ones(prediction, weighting, expected):
    diffusion = GaussianDiffusion(BETAS, prediction)
    found = loss_weight(diffusion, torch.arange(T), DiffusionConfig(weighting=weighting))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected(diffusion.snr), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "min_snr", "min_snr_gamma": 2.0}, lambda snr: np.minimum(snr, 2) / snr),
        ({"weighting": "p2", "p2_gamma": 0.5}, lambda snr: (1 + snr) ** -0.5),
        ({"weighting": "p2", "p2_k": 3.0, "p2_gamma": 2.0}, lambda snr: (3 + snr) ** -2.0),
    ],
)
def test_weights_have_their_settings(settings, expected):
    diffusion = GaussianDiffusion(BETAS)
    found = loss_weight(diffusion, torch.arange(T), DiffusionConfig(**settings))
    np.testing.assert_allclose(found, expected(diffusion.snr), rtol=1e-5)


def test_kl_equals_torch_distributions():
    m1, l1, m2, l2 = torch.randn(4, 50, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, (l1 / 2).exp()), torch.distributions.Normal(m2, (l2 / 2).exp())
    )
    torch.testing.assert_close(normal_kl(m1, l1, m2, l2), expected)


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.5])
@pytest.mark.parametrize("mean", [-0.9, 0.0, 0.41])
def test_decoder_equals_scipy_and_sums_to_one(scale, mean):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    found = discretized_gaussian_log_likelihood(x, *torch.tensor([mean, math.log(scale)], dtype=torch.float64))
    low, high = x.numpy() - 1 / 255, x.numpy() + 1 / 255
    low[0], high[-1] = -np.inf, np.inf
    normal = scipy.stats.norm(mean, scale)
    mass = np.where(low > mean, normal.sf(low) - normal.sf(high), normal.cdf(high) - normal.cdf(low))
    np.testing.assert_allclose(found, np.log(np.maximum(mass, 1e-12)), rtol=1e-6, atol=1e-9)
    assert found.exp().sum() == pytest.approx(1, abs=1e-9)


def test_decoder_in_float32_holds_far_from_the_mean():
    """Where 1 - cdf would cancel: bins six deviations above the mean."""
    x, mean, scale = torch.tensor([0.6, -0.6]), torch.zeros(2), 0.1
    found = discretized_gaussian_log_likelihood(x, mean, torch.tensor(math.log(scale)))
    exact = math.log(scipy.stats.norm.sf(0.6 - 1 / 255, scale=scale) - scipy.stats.norm.sf(0.6 + 1 / 255, scale=scale))
    assert found[0] == found[1]
    assert found[0].item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge", "learned", "learned_range"])
def test_vlb_term_equals_its_definition(variance):
    x, eps, t, answer = batch()
    diffusion = GaussianDiffusion(BETAS, variance=variance)
    x_t = diffusion.q_sample(x, t, eps)
    output = torch.cat([answer, answer - 4], dim=1) if diffusion.learns_variance else answer
    reverse = diffusion.p_mean_variance(output, x_t, t)
    found = vlb_term(diffusion, reverse, x, x_t, t)
    for i, time in enumerate(t.tolist()):
        p = torch.distributions.Normal(reverse.mean[i].double(), reverse.variance.expand_as(x)[i].double().sqrt())
        if time == 0:
            upper = torch.where(x[i] > 0.999, torch.inf, x[i] + 1 / 255)
            lower = torch.where(x[i] < -0.999, -torch.inf, x[i] - 1 / 255)
            expected = -(p.cdf(upper) - p.cdf(lower)).clamp(min=1e-12).log()
        else:
            mean = diffusion.posterior_mean_coef1[time] * x[i] + diffusion.posterior_mean_coef2[time] * x_t[i]
            q = torch.distributions.Normal(mean.double(), float(diffusion.posterior_variance[time] ** 0.5))
            expected = torch.distributions.kl_divergence(q, p)
        assert found[i].item() == pytest.approx(expected.mean().item() / math.log(2), rel=2e-3, abs=1e-6)


def test_vlb_loss_is_the_bound_over_t():
    x, eps, t, answer = batch()
    diffusion = GaussianDiffusion(BETAS)
    losses = training_losses(diffusion, lambda *_: answer, x, t, eps, None, DiffusionConfig(loss="vlb"))
    torch.testing.assert_close(losses.terms["vlb"], losses.loss * T)


def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound():
    x, eps, t, answer = batch()
    diffusion = GaussianDiffusion(BETAS, variance="learned_range")
    cfg = DiffusionConfig(loss="hybrid", variance="learned_range", vlb_weight=1e-3)
    output = torch.cat([answer, torch.zeros_like(answer)], dim=1).requires_grad_()
    losses = training_losses(diffusion, lambda *_: output, x, t, eps, None, cfg)
    losses.loss.sum().backward()
    of_mean, of_variance = output.grad.chunk(2, dim=1)
    torch.testing.assert_close(of_mean, 2 * (answer - eps) / answer[0].numel())
    assert (of_variance.flatten(1).abs().sum(dim=1) > 0).all()
    torch.testing.assert_close(losses.loss, losses.terms["mse"] + 1e-3 * losses.terms["vlb"])
    assert not losses.terms["vlb"].requires_grad


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_the_weight_is_the_squared_errors_alone_and_not_in_the_log(loss):
    x, eps, t, answer = batch()
    variance = "learned_range" if loss == "hybrid" else "fixedlarge"
    diffusion = GaussianDiffusion(BETAS, variance=variance)
    output = torch.cat([answer, torch.zeros_like(answer)], dim=1) if loss == "hybrid" else answer
    cfg = DiffusionConfig(loss=loss, variance=variance, weighting="min_snr", vlb_weight=0.5)
    losses = training_losses(diffusion, lambda *_: output, x, t, eps, None, cfg)
    mse = ((eps - answer) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.terms["mse"], mse)
    snr = torch.tensor(diffusion.snr[t])
    bound = 0.5 * losses.terms["vlb"] if loss == "hybrid" else 0.0
    torch.testing.assert_close(losses.loss, (snr.clamp(max=5) / snr * mse + bound).float())


# Dropped labels


def test_label_dropout():
    labels = torch.arange(20000) % 10
    places = torch.arange(20000)
    found = drop_labels(labels, 10, 0.1, 0, 3, places, 20000)
    dropped = found == 10
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20000))
    assert torch.equal(found[~dropped], labels[~dropped])
    assert torch.equal(found[5000:], drop_labels(labels[5000:], 10, 0.1, 0, 3, places[5000:], 20000))
    assert torch.equal(drop_labels(labels, 10, 0.0, 0, 3, places, 20000), labels)
    assert (drop_labels(labels, 10, 1.0, 0, 3, places, 20000) == 10).all()


def test_label_dropout_differs_from_step_to_step_and_knows_nothing_of_t():
    places, count = torch.arange(5000), 5000
    labels = torch.zeros(count, dtype=torch.int64)
    dropped = torch.stack([drop_labels(labels, 1, 0.5, 0, step, places, count) for step in (3, 4)]).double()
    t = draw_t(GaussianDiffusion(BETAS), DiffusionConfig(), 0, 3, places, count)[0].double()
    correlation = torch.corrcoef(torch.stack([*dropped, t]))
    assert (correlation - torch.eye(3)).abs().max() < 5 / math.sqrt(count)
