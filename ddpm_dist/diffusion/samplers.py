"""Sampling: settings, network and process to images; which samplers there are."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion import solvers
from ddpm_dist.diffusion.denoiser import Guide, Network, check_labels, make_denoiser
from ddpm_dist.diffusion.grids import respace
from ddpm_dist.diffusion.process import Process, Times
from ddpm_dist.diffusion.solvers import Chain, Churn, Sampled, churned
from ddpm_dist.errors import ConfigError, SamplingError
from ddpm_dist.rng import Purpose


class Step(NamedTuple):
    """What a callback gets after each step."""

    k: int
    """Number of the step, from 0, in the whole chain."""
    t: float
    """The time that the step left; whole in a discrete process."""
    x: Tensor
    """[B,C,H,W] float32 at the next visited time; x_0 after the last step."""
    x_start: Tensor
    """[B,C,H,W] float32: the estimate of x_0 that the step used (the paper's progressive generation)."""


SAMPLERS: dict[str, Callable[[Chain, Tensor], Sampled]] = {
    "ddpm": solvers.ddpm,
    "ddim": solvers.ddim,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "euler": solvers.euler,
    "heun": solvers.heun,
    "unipc": solvers.unipc,
}


def sample(
    network: Network,
    diffusion: Process,
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
    t_start: float | None = None,
    guide: Guide | None = None,
) -> Tensor:
    """Images from noise: [B,C,H,W] float32 in [-1, 1].

    indices: [B] int64, the numbers of the images; with the seed they fix all noise, whatever batch they are in.
    shape: (C, H, W). labels: [B] int64 in 0..null_label, or None for an unconditional network, whose null_label is
    None. null_label: the number of classes, which as a label means none (a network without a null class refuses it).
    x_T: [B,C,H,W] to start from instead of fresh noise. t_start: the time that x_T belongs to, visited first; the
    plan's later times follow, with the noise that they have in an unbroken chain (if t_start is above them all, it
    takes the first one's noise, and each the next one's). callback: gets a Step after each step. guide: the network of
    settings.guide.
    Raises ConfigError or SamplingError if the settings don't fit the process, the network or each other.
    """
    images = x_T
    for step in trajectory(
        network, diffusion, settings, seed=seed, indices=indices, shape=shape, labels=labels, null_label=null_label,
        device=device, x_T=x_T, t_start=t_start, guide=guide,
    ):  # fmt: skip
        images = step.x
        if callback is not None:
            callback(step)
    assert images is not None
    return images.clamp(-1, 1)


@torch.no_grad()
def trajectory(
    network: Network,
    diffusion: Process,
    settings: SamplingConfig,
    *,
    seed: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
    x_T: Tensor | None = None,
    t_start: float | None = None,
    guide: Guide | None = None,
) -> Iterator[Step]:
    """Arguments as of `sample`, but yields every Step, and the last x is not clipped."""
    chain, first = make_chain(
        network, diffusion, settings, seed, indices, shape, labels, null_label, device, t_start, guide
    )
    if x_T is None:
        if t_start is not None:
            raise SamplingError(f"t_start is {t_start}, but no x_T was given that belongs to it")
        x_T = first_noise(
            diffusion, float(chain.times[0]), rng.normal(seed, Purpose.X_T, indices, shape, device=device)
        )
    elif x_T.shape != (len(indices), *shape):
        raise SamplingError(f"x_T has shape {tuple(x_T.shape)}; {(len(indices), *shape)} is needed")
    for k, (x, x_start) in enumerate(SAMPLERS[settings.sampler](chain, x_T.to(device).float())):
        yield Step(first + k, chain.times[k].item(), x, x_start)


def first_noise(diffusion: Process, t: float, noise: Tensor) -> Tensor:
    """x_t that a chain starts from at t, of standard normal noise [B,C,H,W]."""
    deviation = diffusion.path.prior_std(t)
    return noise if deviation == 1 else deviation * noise


def make_chain(
    network: Network,
    diffusion: Process,
    settings: SamplingConfig,
    seed: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None,
    null_label: int | None,
    device: torch.device | str,
    t_start: float | None = None,
    guide: Guide | None = None,
) -> tuple[Chain, int]:
    """The chain that a sampler is given, and the number of its first step; arguments and errors as of `sample`."""
    check_settings(settings, diffusion)
    check_labels(labels, null_label, len(indices))
    indices = indices.to(device)
    times, first = _from_time(respace(diffusion, settings.steps, settings.spacing), t_start, diffusion)

    def noise(k: int) -> Tensor:
        return rng.normal(seed, Purpose.REVERSE, indices, shape, step=first + k)

    churn = Churn(settings.churn, settings.churn_interval or Churn.interval, settings.churn_noise)
    starts = churned(diffusion, times, churn)
    asked = times if starts is None else np.concatenate([times, starts])
    denoise = make_denoiser(network, diffusion, settings, asked, labels, null_label, device, guide)
    return Chain(denoise, diffusion, times, noise, settings.eta or 0.0, churn, starts), first


def check_settings(settings: SamplingConfig, diffusion: Process) -> None:
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
    if settings.churn and settings.sampler != "heun":
        raise ConfigError(
            f"sampling.churn: {settings.churn}; only heun is churned, not {settings.sampler}; leave it out"
        )
    times = respace(diffusion, settings.steps, settings.spacing)
    if diffusion.ends_in_noise and times[0] != diffusion.path.last:
        raise ConfigError(
            f"sampling.spacing: {settings.spacing} starts at t = {times[0]}, where this process, made with "
            "zero_terminal_snr, still holds signal; use trailing, uniform or log_snr"
        )
    if settings.sampler == "ddpm" and diffusion.variance == "learned" and len(times) <= diffusion.path.last:
        raise ConfigError(
            f"sampling.steps: {settings.steps}; the network learned the variance of single steps, which longer ones "
            "don't have; use all steps, another sampler, or a network with diffusion.variance: learned_range"
        )


def _from_time(times: Times, t_start: float | None, diffusion: Process) -> tuple[Times, int]:
    """The times from t_start on, which is put in if it is not among them, and the number of the first step."""
    if t_start is None:
        return times, 0
    check_time(diffusion, t_start, "t_start")
    later = times[times < t_start]
    return np.concatenate([np.array([t_start], times.dtype), later]), max(0, len(times) - len(later) - 1)


def check_time(diffusion: Process, t: float, name: str = "t") -> None:
    """SamplingError unless the process has this time."""
    path = diffusion.path
    if not path.first <= t <= path.last or (diffusion.discrete and t != int(t)):
        raise SamplingError(f"{name} is {t}; the times of this process are {path.first:g} to {path.last:g}")
