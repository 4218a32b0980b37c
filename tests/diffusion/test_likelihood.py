"""The bound against the entropy of data that are known, and its curve against its definition."""

import math

import numpy as np
import pytest
import torch

from ddpm_dist import rng
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.likelihood import BitsPerDim, bits_per_dim, concatenate, rate_distortion
from ddpm_dist.diffusion.schedules import make_betas

DEVIATION = 0.25


def exact_network(diffusion):
    """The exact prediction for Gaussian pixels, and the exact log-variance of q(x_{t-1} | x_t) if it is learned."""
    log_variance = torch.tensor(
        np.log(diffusion.posterior_variance + diffusion.posterior_mean_coef1**2 * uncertainty(diffusion))
    ).float()

    def network(x, t, labels):
        signal = diffusion.at("sqrt_alphas_cumprod", t, x)
        x_start = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + 1 - signal**2) * x
        value = diffusion.from_x_start(x_start, x, t, diffusion.prediction)
        if diffusion.learns_variance:
            value = torch.cat([value, log_variance[t].reshape(-1, 1, 1, 1).expand_as(x)], dim=1)
        return value

    return network


def uncertainty(diffusion):
    """Variance of x_0 given x_t, [T]."""
    a = diffusion.alphas_cumprod
    return DEVIATION**2 * (1 - a) / (a * DEVIATION**2 + 1 - a)


def images(count=256):
    x = DEVIATION * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    return ((x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1).float()


def expected_terms(diffusion):
    """E[KL] of each reverse step t > 0 in bits/dim, for Gaussian data and the exact mean: closed form."""
    p, q = np.exp(diffusion.fixed_log_variance), diffusion.posterior_variance
    with np.errstate(divide="ignore"):
        kl = 0.5 * (np.log(p / q) - 1 + q / p + diffusion.posterior_mean_coef1**2 * uncertainty(diffusion) / p)
    return kl / math.log(2)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_bound_is_the_entropy(prediction):
    """With the exact reverse process the bound is tight: -log2 p(x) of each image, and on average the entropy."""
    diffusion = GaussianDiffusion(make_betas("linear", 1000), prediction, "learned")
    x = images()
    bits = bits_per_dim(exact_network(diffusion), diffusion, x, seed=0, indices=torch.arange(len(x)), clip="none")
    assert bits.terms.shape == (256, 1000)
    surprise = math.log2(DEVIATION * math.sqrt(2 * math.pi) * 127.5) + (
        (x.double() ** 2).mean(dim=(1, 2, 3)) / DEVIATION**2 / 2 / math.log(2)
    )
    excess = bits.total - surprise
    assert abs(excess.mean().item()) < 4 * excess.std().item() / 16
    entropy = math.log2(DEVIATION * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert bits.total.mean().item() == pytest.approx(entropy, abs=4 * bits.total.std().item() / 16)
    assert excess.std().item() / 16 < 0.05


def test_terms_have_their_expectations():
    diffusion = GaussianDiffusion(make_betas("linear", 300, 3e-4, 0.06), "eps", "fixedsmall")
    x = images()
    bits = bits_per_dim(exact_network(diffusion), diffusion, x, seed=0, indices=torch.arange(len(x)), clip="none")
    expected = expected_terms(diffusion)[1:]
    found = bits.terms.mean(dim=0).numpy()[1:]
    error = bits.terms.std(dim=0).numpy()[1:] / 16
    assert (np.abs(found - expected) < 5.5 * error + 1e-9).all()


def test_fixedlarge_bound_is_looser_by_its_closed_form():
    x = images()
    totals = {}
    for variance in ("fixedsmall", "fixedlarge"):
        diffusion = GaussianDiffusion(make_betas("linear", 200, 5e-4, 0.1), "eps", variance)
        bits = bits_per_dim(exact_network(diffusion), diffusion, x, seed=0, indices=torch.arange(len(x)), clip="none")
        totals[variance] = bits.terms[:, 1:].sum(dim=1).mean().item(), expected_terms(diffusion)[1:].sum()
    found = totals["fixedlarge"][0] - totals["fixedsmall"][0]
    assert found == pytest.approx(totals["fixedlarge"][1] - totals["fixedsmall"][1], rel=0.05)


def test_zero_terminal_snr_has_no_prior_bits():
    diffusion = GaussianDiffusion(make_betas("linear", 100, zero_terminal_snr=True), "v", "fixedsmall")
    x = images(4)
    bits = bits_per_dim(exact_network(diffusion), diffusion, x, seed=0, indices=torch.arange(4))
    assert (bits.prior == 0).all()
    assert bits.total.isfinite().all()


def test_noise_belongs_to_the_image_not_to_the_batch():
    diffusion = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3))
    x, network = images(7), exact_network(diffusion)
    whole = bits_per_dim(network, diffusion, x, seed=5, indices=torch.arange(7))
    parts = [bits_per_dim(network, diffusion, x[i : i + 1], seed=5, indices=torch.tensor([i])) for i in range(7)]
    for name in ("prior", "terms", "x_start_mse", "eps_mse", "total"):
        torch.testing.assert_close(
            getattr(concatenate(parts), name), getattr(whole, name), rtol=1e-5, atol=1e-8, msg=name
        )


def test_each_t_has_its_own_noise_and_the_labels():
    diffusion, seen = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3)), []

    def network(x_t, t, labels):
        seen.append((x_t, t, labels))
        return x_t

    x, indices, labels = images(3), torch.tensor([4, 0, 9]), torch.tensor([2, 0, 1])
    bits_per_dim(network, diffusion, x, seed=5, indices=indices, labels=labels)
    assert len(seen) == 20
    for time, (x_t, t, given) in enumerate(seen):
        assert t.tolist() == [time] * 3
        assert given is labels
        eps = rng.normal(5, rng.Purpose.LIKELIHOOD, indices, (1, 4, 4), step=time)
        a = diffusion.alphas_cumprod[time]
        torch.testing.assert_close(x_t, a**0.5 * x + (1 - a) ** 0.5 * eps, rtol=0, atol=1e-6)


def test_errors_of_the_estimates():
    diffusion = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3))
    x = images(7)
    bits = bits_per_dim(lambda x_t, t, labels: torch.zeros_like(x_t), diffusion, x, seed=5, indices=torch.arange(7))
    # eps_hat = 0, so the error of eps is its variance, and x_start is x_t / sqrt(alpha_bar), clipped.
    assert bits.eps_mse.mean().item() == pytest.approx(1, abs=0.1)
    assert bits.x_start_mse.max() <= 4
    unclipped = bits_per_dim(
        lambda x_t, t, labels: torch.zeros_like(x_t), diffusion, x, seed=5, indices=torch.arange(7), clip="none"
    )
    torch.testing.assert_close(
        unclipped.x_start_mse, unclipped.eps_mse / torch.tensor(diffusion.snr), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("prediction", ["x_start", "v", "x_prev"])
def test_errors_are_the_same_numbers_for_every_prediction(prediction):
    """The same estimate, said otherwise; x_start is clipped and eps is not."""
    x, found = images(7), []
    for name in ("eps", prediction):
        diffusion = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3), name)

        def network(x_t, t, labels, d=diffusion):
            return d.from_x_start(1.5 * x_t / d.at("sqrt_alphas_cumprod", t, x_t), x_t, t, d.prediction)

        found.append(bits_per_dim(network, diffusion, x, seed=5, indices=torch.arange(7)))
    torch.testing.assert_close(found[1].eps_mse, found[0].eps_mse, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1].x_start_mse, found[0].x_start_mse, rtol=1e-4, atol=1e-8)


def test_rate_distortion_is_table_4s():
    """Reverse step r holds the prior's bits and those of the terms above t = T - r; all but the decoder's at T."""
    terms = torch.tensor([[3.0, 1.0, 0.5, 0.25], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mse = torch.tensor([[0.0002, 0.02, 0.08, 0.5], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    bits = BitsPerDim(torch.tensor([0.002, 0.0]).double(), terms, mse, mse)
    assert bits.total.tolist() == pytest.approx([4.752, 1])
    curve = rate_distortion(bits)
    torch.testing.assert_close(curve.rate, torch.tensor([0.001, 0.126, 0.376, 0.876], dtype=torch.float64))
    torch.testing.assert_close(curve.rmse, torch.tensor([63.75, 25.5, 12.75, 1.275], dtype=torch.float64))
