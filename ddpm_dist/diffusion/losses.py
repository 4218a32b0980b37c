"""Training losses (Ho et al. 2020; Nichol & Dhariwal 2021; Karras et al. 2022; Lipman et al. 2022)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.denoiser import Network
from ddpm_dist.diffusion.gaussian import GaussianDiffusion, Reverse
from ddpm_dist.diffusion.process import Process
from ddpm_dist.rng import Purpose


@dataclass(frozen=True)
class Losses:
    """loss: [B] float32, to be averaged (after the weights of `draw_t`). terms: [B] each, detached, for the logs:
    "mse" of the prediction before weighting, "vlb" in bits/dim (an estimate of the whole bound, T · L_t)."""

    loss: Tensor
    terms: dict[str, Tensor]


def training_losses(
    diffusion: Process,
    network: Network,
    x_start: Tensor,
    t: Tensor,
    eps: Tensor,
    labels: Tensor | None,
    cfg: DiffusionConfig,
) -> Losses:
    """Loss of each image of a batch.

    x_start: [B,C,H,W] in [-1, 1]. t: [B] of `draw_t`. eps: standard normal [B,C,H,W]. labels: [B] int64 or None.
    simple: mean squared error of the prediction over pixels (equation 14), times cfg.weighting. Of EDM's F that is
    their weighted loss (equation 8, with weight 1 / c_out²), of the velocity conditional flow matching.
    vlb: the bound's term L_t in bits/dim, as in Ho et al.'s code (so E_t[loss] is the bound / T).
    hybrid: simple + vlb_weight · T · L_t, where the mean gets no gradient from L_t (Nichol & Dhariwal, equation 16).
    """
    x_t = diffusion.q_sample(x_start, t, eps)
    output = diffusion.call(network, x_t, t, labels)
    value, variance_values = diffusion.split(output, x_start.shape[1])
    target = diffusion.target(x_start, x_t, t, eps)
    mse = flat_mean((value - target) ** 2)
    terms = {"mse": mse.detach()}
    if cfg.loss == "simple":
        return Losses(loss_weight(diffusion, t, cfg) * mse, terms)
    assert isinstance(diffusion, GaussianDiffusion), "the configuration has the bound for process: ddpm alone"
    if cfg.loss == "hybrid" and variance_values is not None:
        output = torch.cat([value.detach(), variance_values], dim=1)
    bound = vlb_term(diffusion, diffusion.p_mean_variance(output, x_t, t), x_start, x_t, t)
    terms["vlb"] = bound.detach() * diffusion.timesteps
    if cfg.loss == "vlb":
        return Losses(bound, terms)
    return Losses(loss_weight(diffusion, t, cfg) * mse + cfg.vlb_weight * diffusion.timesteps * bound, terms)


def loss_weight(diffusion: Process, t: Tensor, cfg: DiffusionConfig) -> Tensor:
    """Weight of the squared error of the process's own prediction at t: [B] float32.

    Each weighting is defined on one prediction's error; in the others' it is divided by the ratio of the errors.
    """
    if cfg.weighting == "none":
        return torch.ones(t.shape, device=t.device)
    snr = diffusion.snr_at(t)
    if cfg.weighting == "min_snr":  # Hang et al. 2023: min(SNR, gamma) on x_start's error
        of_x_start = snr.clamp(max=cfg.min_snr_gamma)
    else:  # Choi et al. 2022, equation 8: 1 / (k + SNR)^gamma on eps's error, which is SNR times x_start's
        of_x_start = snr / (cfg.p2_k + snr) ** cfg.p2_gamma
    # x_start = … + w · prediction, so an error of the prediction counts w² times in x_start.
    return of_x_start * diffusion.pair("x_start", t, snr, diffusion.prediction)[1] ** 2


def vlb_term(diffusion: GaussianDiffusion, reverse: Reverse, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_t of the variational bound in bits/dim: [B] (equation 5), of what `p_mean_variance` gave.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 the discretised decoder's -log p(x_0 | x_1).
    """
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    kl = flat_mean(normal_kl(mean, log_variance, reverse.mean, reverse.log_variance))
    decoder = -flat_mean(discretized_gaussian_log_likelihood(x_start, reverse.mean, 0.5 * reverse.log_variance))
    return torch.where(t == 0, decoder, kl) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise, of any shapes that broadcast."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log p(x) in nats of pixels x (uint8 scaled to [-1, 1]) under a Gaussian, of any shape (equation 13).

    The Gaussian is integrated over each pixel's bin of width 2/255; the outermost bins reach to infinity.
    The integral is exact; the official code approximates the distribution function by a tanh, within 2e-4.
    """
    inverse_scale = torch.exp(-log_scale)
    offset = x - mean
    # A bin's mass is the same on either side of the mean; on the lower side the difference doesn't cancel.
    near, far = 1 / 255 - offset.abs(), -1 / 255 - offset.abs()
    inside = _normal_cdf(inverse_scale * near) - _normal_cdf(inverse_scale * far)
    lowest = _normal_cdf(inverse_scale * (1 / 255 + offset))
    highest = _normal_cdf(inverse_scale * (1 / 255 - offset))
    mass = torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))
    return torch.log(mass.clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    """By erfc, which keeps the lower tail; torch.special.ndtr is 0 from -5.5 on in float32."""
    return 0.5 * torch.erfc(-(0.5**0.5) * x)


def flat_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: [B]."""
    return x.flatten(1).mean(dim=1)


def drop_labels(
    labels: Tensor, null_label: int, probability: float, seed: int, step: int, places: Tensor, global_batch: int
) -> Tensor:
    """Labels of which each is replaced by the null class with the given probability: [b] int64.

    Training on these gives a network for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    """
    u = rng.uniform(seed, Purpose.LABEL_DROPOUT, places + step * global_batch, device=labels.device)
    return torch.where(u < probability, null_label, labels)
