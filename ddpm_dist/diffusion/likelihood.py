"""Likelihood: the variational bound in bits/dim, its terms, and the rate-distortion curve (Ho et al. 2020, 4.3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.diffusion.denoiser import Network, make_clip
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.losses import flat_mean, vlb_term
from ddpm_dist.rng import Purpose

LEVELS_PER_UNIT = 127.5
"""Grey levels (of 0..255) in a unit of the model's range [-1, 1]."""


@dataclass(frozen=True)
class BitsPerDim:
    """Of each image, in float64."""

    prior: Tensor
    """[B] bits/dim: L_T, the KL of q(x_T | x_0) to the standard normal; nothing can be trained in it."""
    terms: Tensor
    """[B,T] bits/dim: the decoder's -log p(x_0 | x_1) in column 0, then the KL of each reverse step."""
    x_start_mse: Tensor
    """[B,T]: mean squared error of the estimate of x_0 at each t, in squared units of [-1, 1]."""
    eps_mse: Tensor
    """[B,T]: mean squared error of the eps that the same estimate means; not clipped."""

    @property
    def total(self) -> Tensor:
        """[B] bits/dim: the bound on -log2 p(x_0) per dimension."""
        return self.prior + self.terms.sum(dim=1)


@torch.no_grad()
def bits_per_dim(
    network: Network,
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    *,
    seed: int,
    indices: Tensor,
    labels: Tensor | None = None,
    clip: str = "static",
) -> BitsPerDim:
    """The variational bound of each image (equation 5), every term with one draw of x_t; T evaluations.

    x_start: [B,C,H,W], uint8 images scaled to [-1, 1]; anything else makes the decoder's bits meaningless.
    indices: [B] int64, the images' numbers: they and the seed fix the noise. labels: [B] int64 or None.
    clip: of x_start before each reverse mean; static is the paper's, none gives the bound that is trained.
    """
    clip_x_start = make_clip(clip)
    exact = x_start.double()  # late terms are of 1e-6 bits, which float32 would drown
    terms, x_start_mse, eps_mse = [], [], []
    for time in range(diffusion.timesteps):
        t = torch.full((len(x_start),), time, device=x_start.device)
        eps = rng.normal(seed, Purpose.LIKELIHOOD, indices, x_start.shape[1:], step=time, device=x_start.device)
        x_t = diffusion.q_sample(x_start.float(), t, eps)
        output = network(x_t, t, labels).double()
        value, _ = diffusion.split(output, x_start.shape[1])
        reverse = diffusion.p_mean_variance(output, x_t.double(), t, clip_x_start)
        terms.append(vlb_term(diffusion, reverse, exact, x_t.double(), t))
        x_start_mse.append(flat_mean((reverse.x_start - exact) ** 2))
        if diffusion.prediction != "eps":
            value = diffusion.from_x_start(diffusion.to_x_start(value, x_t.double(), t), x_t.double(), t, "eps")
        eps_mse.append(flat_mean((value - eps) ** 2))
    return BitsPerDim(
        prior_bits(diffusion, x_start),
        torch.stack(terms, dim=1),
        torch.stack(x_start_mse, dim=1),
        torch.stack(eps_mse, dim=1),
    )


def prior_bits(diffusion: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) in bits/dim: [B] float64."""
    rest = float(diffusion.alphas_cumprod[-1])
    # 1/2 (variance + mean² - 1 - log variance), with the variance 1 - rest
    return 0.5 * (rest * flat_mean(x_start.double() ** 2) - rest - math.log1p(-rest)) / math.log(2)


@dataclass(frozen=True)
class RateDistortion:
    """Progressive coding (section 4.3, table 4); entry r - 1 is reverse step r, r = 1..T."""

    rate: Tensor
    """[T] float64 bits/dim received when x_0 is estimated."""
    rmse: Tensor
    """[T] float64: root mean squared error of the estimate in grey levels of 0..255, over all images."""


def rate_distortion(bits: BitsPerDim) -> RateDistortion:
    """The curve of a set of images (concatenate the BitsPerDim of its batches first).

    At reverse step r the receiver holds x_t with t = T - r: the prior's bits and those of all later terms. The last
    point leaves out the decoder's bits alone, which the paper calls the distortion's share.
    """
    terms = bits.terms.mean(dim=0).flip(0)
    rate = bits.prior.mean() + torch.cat([torch.zeros_like(terms[:1]), terms[:-1].cumsum(0)])
    return RateDistortion(rate, bits.x_start_mse.mean(dim=0).flip(0).sqrt() * LEVELS_PER_UNIT)


def concatenate(parts: list[BitsPerDim]) -> BitsPerDim:
    """One BitsPerDim of several batches."""
    return BitsPerDim(
        torch.cat([p.prior for p in parts]),
        torch.cat([p.terms for p in parts]),
        torch.cat([p.x_start_mse for p in parts]),
        torch.cat([p.eps_mse for p in parts]),
    )
