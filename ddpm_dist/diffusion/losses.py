"""Training losses, the draw of t, and what is recorded of both (Ho et al. 2020; Nichol & Dhariwal 2021)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.denoiser import Network
from ddpm_dist.diffusion.gaussian import GaussianDiffusion, Reverse
from ddpm_dist.errors import ConfigError
from ddpm_dist.rng import Purpose

QUARTILES = 4


@dataclass(frozen=True)
class Losses:
    """loss: [B] float32, to be averaged (after the weights of `draw_t`). terms: [B] each, detached, for the logs:
    "mse" of the prediction before weighting, "vlb" in bits/dim (an estimate of the whole bound, T · L_t)."""

    loss: Tensor
    terms: dict[str, Tensor]


def training_losses(
    diffusion: GaussianDiffusion,
    network: Network,
    x_start: Tensor,
    t: Tensor,
    eps: Tensor,
    labels: Tensor | None,
    cfg: DiffusionConfig,
) -> Losses:
    """Loss of each image of a batch.

    x_start: [B,C,H,W] in [-1, 1]. t: [B] int64. eps: standard normal [B,C,H,W]. labels: [B] int64 or None.
    simple: mean squared error of the prediction over pixels (equation 14), times cfg.weighting.
    vlb: the bound's term L_t in bits/dim, as in Ho et al.'s code (so E_t[loss] is the bound / T).
    hybrid: simple + vlb_weight · T · L_t, where the mean gets no gradient from L_t (Nichol & Dhariwal, equation 16).
    """
    x_t = diffusion.q_sample(x_start, t, eps)
    output = network(x_t, t, labels)
    value, variance_values = diffusion.split(output, x_start.shape[1])
    target = diffusion.target(x_start, x_t, t, eps)
    mse = flat_mean((value - target) ** 2)
    terms = {"mse": mse.detach()}
    if cfg.loss == "simple":
        return Losses(loss_weight(diffusion, t, cfg) * mse, terms)
    if cfg.loss == "hybrid" and variance_values is not None:
        output = torch.cat([value.detach(), variance_values], dim=1)
    bound = vlb_term(diffusion, diffusion.p_mean_variance(output, x_t, t), x_start, x_t, t)
    terms["vlb"] = bound.detach() * diffusion.timesteps
    if cfg.loss == "vlb":
        return Losses(bound, terms)
    return Losses(loss_weight(diffusion, t, cfg) * mse + cfg.vlb_weight * diffusion.timesteps * bound, terms)


def loss_weight(diffusion: GaussianDiffusion, t: Tensor, cfg: DiffusionConfig) -> Tensor:
    """Weight of the squared error of the process's own prediction at t: [B] float32.

    Each weighting is defined on one prediction's error; in the others' it is divided by the ratio of the errors.
    """
    if cfg.weighting == "none":
        return torch.ones(t.shape, device=t.device)
    like = torch.empty(0, device=t.device)
    snr = diffusion.at("snr", t, like)
    if cfg.weighting == "min_snr":  # Hang et al. 2023: min(SNR, gamma) on x_start's error
        of_x_start = snr.clamp(max=cfg.min_snr_gamma)
    else:  # Choi et al. 2022, equation 8: 1 / (k + SNR)^gamma on eps's error, which is SNR times x_start's
        of_x_start = snr / (cfg.p2_k + snr) ** cfg.p2_gamma
    # x_start = … + w · prediction, so an error of the prediction counts w² times in x_start.
    return of_x_start * diffusion.at(f"_weight_of_{diffusion.prediction}", t, like) ** 2


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


# The draw of t


def draw_t(
    cfg: DiffusionConfig,
    seed: int,
    step: int,
    places: Tensor,
    global_batch: int,
    history: "LossHistory | None" = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Diffusion times of some places of global batch `step`: t [b] int64 in 0..T-1 and weights [b] float32.

    places: [b] int64 in 0..global_batch-1. The weighted mean of the losses is an unbiased estimate of their mean
    over uniform t, whichever way t is drawn. Depends on nothing else than the arguments.
    """
    indices = (places + step * global_batch).to(device)
    if cfg.t_sampling == "uniform":
        t = rng.integers(seed, Purpose.T, indices, cfg.timesteps)
    elif cfg.t_sampling == "stratified":
        # One uniform offset a step, shared by all ranks, and evenly spaced places (Kingma et al. 2021, appendix I.1):
        # every place's t stays uniform, so no stream of the data is tied to a range of t.
        offset = rng.uniform(seed, Purpose.T, torch.tensor([step * global_batch], device=device))
        share = (offset + places.to(device).double() / global_batch) % 1
        t = (share * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
    else:
        if history is None:
            raise ConfigError("diffusion.t_sampling: loss_second_moment needs the history of losses of the run")
        return history.draw(rng.uniform(seed, Purpose.T, indices))
    return t, torch.ones(t.shape, device=t.device)


def drop_labels(
    labels: Tensor, null_label: int, probability: float, seed: int, step: int, places: Tensor, global_batch: int
) -> Tensor:
    """Labels of which each is replaced by the null class with the given probability: [b] int64.

    Training on these gives a network for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    """
    u = rng.uniform(seed, Purpose.LABEL_DROPOUT, places + step * global_batch, device=labels.device)
    return torch.where(u < probability, null_label, labels)


class LossHistory:
    """The last losses of each t, for drawing t in proportion to sqrt(E[L_t²]) (Nichol & Dhariwal, equation 18).

    Until every t has `per_t` losses, t is uniform. All ranks must update it with the same gathered losses.
    """

    def __init__(self, timesteps: int, per_t: int = 10, uniform_share: float = 1e-3) -> None:
        self.uniform_share = uniform_share
        self.losses = np.zeros((timesteps, per_t))
        self.counts = np.zeros(timesteps, np.int64)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Records the losses [n] of the times t [n] int64, in this order; those that are not finite are left out."""
        times, values = t.cpu().numpy(), loss.detach().cpu().numpy().astype(np.float64)
        finite = np.isfinite(values)
        order = np.argsort(times[finite], kind="stable")
        times, values = times[finite][order], values[finite][order]
        news = np.bincount(times, minlength=len(self.counts))
        number = np.arange(len(times)) - (np.cumsum(news) - news)[times]  # of each loss among those of its time
        last = number >= news[times] - self.losses.shape[1]
        times, values, number = times[last], values[last], number[last]
        self.losses[times, (self.counts[times] + number) % self.losses.shape[1]] = values
        self.counts += news

    def probabilities(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each t: [T] float64."""
        timesteps, per_t = self.losses.shape
        root = np.sqrt((self.losses**2).mean(axis=1))
        if (self.counts < per_t).any() or not root.sum() > 0:
            return np.full(timesteps, 1 / timesteps)
        return root / root.sum() * (1 - self.uniform_share) + self.uniform_share / timesteps

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t [b] int64 by the inverse distribution function at u [b] in [0, 1), and weights 1 / (T p_t) [b]."""
        p = torch.from_numpy(self.probabilities()).to(u.device)
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    def state_dict(self) -> dict[str, Tensor]:
        """`losses` [T, per_t] float64 and `counts` [T] int64, as tensors of their own."""
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave; ConfigError where the shape is that of another number of timesteps."""
        # A state is JSON, of which a reader may make float32: with that the probabilities would differ after a resume.
        losses, counts = state["losses"].double().numpy().copy(), state["counts"].long().numpy().copy()
        if losses.shape != self.losses.shape:
            raise ConfigError(
                f"diffusion.timesteps: the history of losses has shape {losses.shape}, this run needs "
                f"{self.losses.shape}; use the timesteps that it was trained with"
            )
        self.losses, self.counts = losses, counts


def quartile_means(t: Tensor, loss: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """Sums [4] and counts [4], both float64, of the losses [B] by quartile of t [B]; add over ranks, then divide."""
    member = (t * QUARTILES // timesteps)[:, None] == torch.arange(QUARTILES, device=t.device)
    # where, not a product: a loss that isn't finite stays in its own quartile.
    sums = torch.where(member, loss.detach().double()[:, None], 0.0).sum(dim=0)
    return sums, member.double().sum(dim=0)
