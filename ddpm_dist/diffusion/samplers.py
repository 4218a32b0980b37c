"""Samplers: from noise to an image, each one function with one signature.

A sampler is a generator sampler(chain, x) over the chain's visited times. After its k-th step it yields
(x, x_start): the image at the next visited time, and the estimate of x_0 that the step used. All that it
multiplies by is computed before the first step, in float64, and lies on the device: a step never waits for one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.denoiser import Denoiser, Network, Times, check_labels, make_denoiser, respace
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import Float64s
from ddpm_dist.errors import ConfigError, SamplingError
from ddpm_dist.rng import Purpose


class Step(NamedTuple):
    """What a callback gets after each step."""

    k: int
    """Number of the step, from 0, in the whole chain."""
    t: int
    """The time that the step left."""
    x: Tensor
    """[B,C,H,W] float32 at the next visited time; x_0 after the last step."""
    x_start: Tensor
    """[B,C,H,W] float32: the estimate of x_0 that the step used (the paper's progressive generation)."""


@dataclass(frozen=True)
class Chain:
    """What a sampler is given beside x."""

    denoise: Denoiser
    """denoise(x, k) -> x_start and variance values at the k-th visited time."""
    diffusion: GaussianDiffusion
    times: Times
    """[S], falling."""
    noise: Callable[[int], Tensor]
    """Standard normal [B,C,H,W] of step k."""
    eta: float

    @property
    def signal(self) -> Float64s:
        """[S + 1]: alpha = sqrt(alpha_bar) at the visited times, then 1, of x_0 itself."""
        return np.append(self.diffusion.sqrt_alphas_cumprod[self.times], 1.0)

    @property
    def sigma(self) -> Float64s:
        """[S + 1]: sqrt(1 - alpha_bar) at the visited times, then 0."""
        return np.append(self.diffusion.sqrt_one_minus_alphas_cumprod[self.times], 0.0)

    def rows(self, *columns: ArrayLike) -> list[tuple[Tensor, ...]]:
        """The k-th numbers of all columns [S], for each step: float32 scalars on the device of the images."""
        table = torch.tensor(np.stack(np.broadcast_arrays(*columns), axis=1), dtype=torch.float32)
        return [row.unbind() for row in table.to(self.denoise.times.device).unbind()]


Sampled = Iterator[tuple[Tensor, Tensor]]


def ddpm(chain: Chain, x: Tensor) -> Sampled:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the process's reverse variance.

    Between times that are not neighbours the process is respaced (Nichol & Dhariwal 2021, section 4).
    """
    spaced = _respaced(chain.diffusion, chain.times)
    falling = slice(None, None, -1)
    rows = chain.rows(
        spaced.posterior_mean_coef1[falling],
        spaced.posterior_mean_coef2[falling],
        np.exp(0.5 * spaced.fixed_log_variance[falling]),
    )
    ranks = torch.arange(len(rows), device=x.device).flip(0)
    for k, (of_x_start, of_x, deviation) in enumerate(rows):
        x_start, variance_values = chain.denoise(x, k)
        x = of_x_start * x_start + of_x * x
        if k < len(rows) - 1:  # no noise in the step to x_0
            if variance_values is not None:
                deviation = torch.exp(0.5 * spaced.log_variance(variance_values, x, ranks[k : k + 1]))
            x = x + deviation * chain.noise(k)
        yield x, x_start


def ddim(chain: Chain, x: Tensor) -> Sampled:
    """Song, Meng & Ermon 2020, equation 12: deterministic at eta 0, with the posterior's variance at eta 1.

    eps is that of the clipped x_start, so that x stays on the sphere its time expects.
    """
    alpha, sigma, alpha_next, sigma_next = chain.signal[:-1], chain.sigma[:-1], chain.signal[1:], chain.sigma[1:]
    deviation = chain.eta * (sigma_next / sigma) * np.sqrt(1 - (alpha / alpha_next) ** 2)
    of_eps = np.sqrt(np.maximum(sigma_next**2 - deviation**2, 0))
    rows = chain.rows(of_eps / sigma, alpha_next - of_eps / sigma * alpha, deviation)
    for k, (of_x, of_x_start, noise_scale) in enumerate(rows):
        x_start, _ = chain.denoise(x, k)
        x = of_x * x + of_x_start * x_start
        if deviation[k] > 0:
            x = x + noise_scale * chain.noise(k)
        yield x, x_start


SAMPLERS: dict[str, Callable[[Chain, Tensor], Sampled]] = {
    "ddpm": ddpm,
    "ddim": ddim,
}


def sample(
    network: Network,
    diffusion: GaussianDiffusion,
    settings: SamplingConfig,
    *,
    seed: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
    x_T: Tensor | None = None,
    callback: Callable[[Step], None] | None = None,
    t_start: int | None = None,
) -> Tensor:
    """Images from noise: [B,C,H,W] float32 in [-1, 1].

    indices: [B] int64, the numbers of the images; with the seed they fix all noise, whatever batch they are in.
    shape: (C, H, W). labels: [B] int64 in 0..null_label (the network's last class, which means none), or None for
    an unconditional network, whose null_label is None. x_T: [B,C,H,W] to start from instead of fresh noise.
    t_start: the time that x_T belongs to, visited first; the plan's later times follow, with the noise that they
    have in an unbroken chain. callback: gets a Step after each step.
    Raises ConfigError or SamplingError if the settings don't fit the process, the network or each other.
    """
    images = x_T
    for step in trajectory(
        network,
        diffusion,
        settings,
        seed=seed,
        indices=indices,
        shape=shape,
        labels=labels,
        null_label=null_label,
        device=device,
        x_T=x_T,
        t_start=t_start,
    ):
        images = step.x
        if callback is not None:
            callback(step)
    assert images is not None
    return images.clamp(-1, 1)


@torch.no_grad()
def trajectory(
    network: Network,
    diffusion: GaussianDiffusion,
    settings: SamplingConfig,
    *,
    seed: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
    x_T: Tensor | None = None,
    t_start: int | None = None,
) -> Iterator[Step]:
    """As `sample`, but yields every Step, and the last x is not clipped."""
    check_settings(settings, diffusion)
    check_labels(labels, null_label, len(indices))
    indices = indices.to(device)
    times, first = _from_time(respace(diffusion.timesteps, settings.steps, settings.spacing), t_start, diffusion)
    if x_T is None:
        if t_start is not None:
            raise SamplingError(f"t_start is {t_start}, but no x_T was given that belongs to it")
        x_T = rng.normal(seed, Purpose.X_T, indices, shape)
    elif x_T.shape != (len(indices), *shape):
        raise SamplingError(f"x_T has shape {tuple(x_T.shape)}; {(len(indices), *shape)} is needed")

    def noise(k: int) -> Tensor:
        return rng.normal(seed, Purpose.REVERSE, indices, shape, step=first + k)

    denoise = make_denoiser(network, diffusion, settings, times, labels, null_label, device)
    chain = Chain(denoise, diffusion, times, noise, settings.eta or 0.0)
    steps = SAMPLERS[settings.sampler](chain, x_T.to(device).float())
    for k, (x, x_start) in enumerate(steps):
        yield Step(first + k, int(times[k]), x, x_start)


def check_settings(settings: SamplingConfig, diffusion: GaussianDiffusion) -> None:
    """Raises ConfigError if the sampler can't do what the settings ask with this process."""
    if settings.sampler not in SAMPLERS:
        raise ConfigError(f"sampling.sampler: {settings.sampler!r} is unknown; choose from {', '.join(SAMPLERS)}")
    if settings.eta is not None and settings.sampler != "ddim":
        raise ConfigError(
            f"sampling.eta: {settings.eta} has no meaning for sampling.sampler: {settings.sampler}; only ddim has eta, "
            "leave it out"
        )
    if settings.eta is not None and not 0 <= settings.eta <= 1:
        raise ConfigError(f"sampling.eta: {settings.eta}; must lie in 0 (deterministic) to 1 (as ancestral sampling)")
    times = respace(diffusion.timesteps, settings.steps, settings.spacing)
    if diffusion.zero_terminal_snr and times[0] != diffusion.timesteps - 1:
        raise ConfigError(
            f"sampling.spacing: {settings.spacing} starts at t = {times[0]}, where this process, made with "
            "zero_terminal_snr, still holds signal; use trailing or uniform"
        )
    if settings.sampler == "ddpm" and diffusion.variance == "learned" and len(times) < diffusion.timesteps:
        raise ConfigError(
            f"sampling.steps: {settings.steps}; the network learned the variance of single steps, which longer ones "
            "don't have; use all steps, another sampler, or a network with diffusion.variance: learned_range"
        )


def _from_time(times: Times, t_start: int | None, diffusion: GaussianDiffusion) -> tuple[Times, int]:
    """The times from t_start on, which is put in if it is not among them, and the number of the first step."""
    if t_start is None:
        return times, 0
    if not 0 <= t_start < diffusion.timesteps:
        raise SamplingError(f"t_start is {t_start}; the times of this process are 0 to {diffusion.timesteps - 1}")
    later = times[times < t_start]
    return np.concatenate([[t_start], later]), len(times) - len(later) - int(t_start in times)


def _respaced(diffusion: GaussianDiffusion, times: Times) -> GaussianDiffusion:
    """The process whose S steps are the given times, and whose network gives x_start."""
    alphas_cumprod = diffusion.alphas_cumprod[times[::-1]]
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return GaussianDiffusion(betas, "x_start", diffusion.variance)
