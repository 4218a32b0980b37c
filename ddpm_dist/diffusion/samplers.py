"""Sampling: settings, network and process to images; which samplers there are."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.denoiser import Network, Times, check_labels, make_denoiser, respace
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.solvers import Chain, Sampled, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, heun, unipc
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


SAMPLERS: dict[str, Callable[[Chain, Tensor], Sampled]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": heun,
    "unipc": unipc,
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
    shape: (C, H, W). labels: [B] int64 in 0..null_label, or None for an unconditional network, whose null_label is
    None. null_label: the number of classes, which as a label means none (a network without a null class refuses it).
    x_T: [B,C,H,W] to start from instead of fresh noise. t_start: the time that x_T belongs to, visited first; the
    plan's later times follow, with the noise that they have in an unbroken chain (if t_start is above them all, it
    takes the first one's noise, and each the next one's). callback: gets a Step after each step.
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
    """Arguments as of `sample`, but yields every Step, and the last x is not clipped."""
    chain, first = make_chain(
        network, diffusion, settings, seed, indices, shape, labels, null_label, device, t_start=t_start
    )
    if x_T is None:
        if t_start is not None:
            raise SamplingError(f"t_start is {t_start}, but no x_T was given that belongs to it")
        x_T = rng.normal(seed, Purpose.X_T, indices, shape, device=device)
    elif x_T.shape != (len(indices), *shape):
        raise SamplingError(f"x_T has shape {tuple(x_T.shape)}; {(len(indices), *shape)} is needed")
    for k, (x, x_start) in enumerate(SAMPLERS[settings.sampler](chain, x_T.to(device).float())):
        yield Step(first + k, int(chain.times[k]), x, x_start)


def make_chain(
    network: Network,
    diffusion: GaussianDiffusion,
    settings: SamplingConfig,
    seed: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None,
    null_label: int | None,
    device: torch.device | str,
    t_start: int | None = None,
) -> tuple[Chain, int]:
    """The chain that a sampler is given, and the number of its first step; arguments and errors as of `sample`."""
    check_settings(settings, diffusion)
    check_labels(labels, null_label, len(indices))
    indices = indices.to(device)
    times, first = _from_time(respace(diffusion, settings.steps, settings.spacing), t_start, diffusion)

    def noise(k: int) -> Tensor:
        return rng.normal(seed, Purpose.REVERSE, indices, shape, step=first + k)

    denoise = make_denoiser(network, diffusion, settings, times, labels, null_label, device)
    return Chain(denoise, diffusion, times, noise, settings.eta or 0.0), first


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
    times = respace(diffusion, settings.steps, settings.spacing)
    if diffusion.zero_terminal_snr and times[0] != diffusion.timesteps - 1:
        raise ConfigError(
            f"sampling.spacing: {settings.spacing} starts at t = {times[0]}, where this process, made with "
            "zero_terminal_snr, still holds signal; use trailing, uniform or log_snr"
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
    return np.concatenate([[t_start], later]), max(0, len(times) - len(later) - 1)
