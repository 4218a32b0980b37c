"""The network as a sampler sees it: an estimate of x_start at each visited time.

Guidance, conversion from what the network predicts, and clipping happen here, so samplers hear of none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.errors import ConfigError, SamplingError

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x [B,C,H,W], t [B], labels [B] int64 or None) -> [B,C,H,W], or [B,2C,H,W] with a learned variance."""

Times = NDArray[np.int64]


LOWEST_LAMBDA = -5.1
"""Where log_snr's even spacing ends, as DPM-Solver's code does; below it, networks hardly see an image."""


def respace(diffusion: GaussianDiffusion, steps: int | None, spacing: str) -> Times:
    """Times that a sampler visits, falling: [steps] int64 in 0..T-1, all different.

    uniform: evenly spaced, both ends included (Nichol & Dhariwal 2021, section 4).
    quadratic: evenly spaced square roots, from 0.8 T (Song et al. 2020, appendix D.2).
    trailing: evenly spaced, counted down from the last time (Lin et al. 2023, section 3.3).
    log_snr: evenly spaced in log-SNR, from the last time (Lu et al. 2022, appendix): for solvers of higher order.
    A time that would be visited twice gives way to its neighbour. steps: None visits all. Raises ConfigError if there
    are fewer times than steps.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"sampling.spacing: {spacing!r} is unknown; choose from {', '.join(SPACINGS)}")
    timesteps = diffusion.timesteps
    if steps is None:
        return np.arange(timesteps)[::-1].copy()
    if not 1 <= steps <= timesteps:
        raise ConfigError(
            f"sampling.steps: {steps} can't be taken out of the {timesteps} times of this diffusion process; "
            f"use 1 to {timesteps}"
        )
    if steps == 1:
        return np.array([timesteps - 1])
    rising, rank = SPACINGS[spacing](diffusion, steps), np.arange(steps)
    rising = np.maximum.accumulate(rising.astype(np.int64) - rank) + rank
    return np.minimum(rising, timesteps - steps + rank)[::-1].copy()


def _uniform(diffusion: GaussianDiffusion, steps: int) -> NDArray[Any]:
    return np.linspace(0, diffusion.timesteps - 1, steps).round()


def _quadratic(diffusion: GaussianDiffusion, steps: int) -> NDArray[Any]:
    return np.linspace(0, np.sqrt(0.8 * diffusion.timesteps), steps) ** 2


def _trailing(diffusion: GaussianDiffusion, steps: int) -> NDArray[Any]:
    return np.round(np.arange(1, steps + 1) * diffusion.timesteps / steps) - 1


def _log_snr(diffusion: GaussianDiffusion, steps: int) -> NDArray[Any]:
    with np.errstate(divide="ignore"):
        lambdas = 0.5 * np.log(diffusion.snr)
    targets = np.linspace(lambdas[0], max(lambdas[-1], LOWEST_LAMBDA), steps)
    nearest = np.abs(lambdas[:, None] - targets).argmin(axis=0)
    nearest[-1] = diffusion.timesteps - 1
    return nearest


SPACINGS: dict[str, Callable[[GaussianDiffusion, int], NDArray[Any]]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "trailing": _trailing,
    "log_snr": _log_snr,
}
"""Times as [steps] numbers that don't fall, for at least 2 steps."""


@dataclass(frozen=True)
class Denoiser:
    """x_start, and the variance channels if there are any, at the k-th visited time."""

    network: Network
    diffusion: GaussianDiffusion
    times: Tensor
    """[S] int64, falling, on the device of the images."""
    weights: tuple[Tensor, Tensor]
    """[S] float32 each: x_start = first · x_t + second · prediction."""
    guided: tuple[bool, ...]
    """[S]: whether guidance is active."""
    guidance_scale: float
    clip: Callable[[Tensor], Tensor]
    labels: Tensor | None
    null_label: int | None

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """x: [B,C,H,W] float32 at times[k]. Returns x_start [B,C,H,W] and variance values [B,C,H,W] or None."""
        output = self._guided_output(x, k) if self.guided[k] else self._output(x, k, self.labels)
        value, variance_values = self.diffusion.split(output.float(), x.shape[1])
        of_x, of_value = self.weights
        return self.clip(of_x[k] * x + of_value[k] * value), variance_values

    def _output(self, x: Tensor, k: int, labels: Tensor | None) -> Tensor:
        return self.network(x, self.times[k].expand(len(x)), labels)

    def _guided_output(self, x: Tensor, k: int) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, equation 6, with scale = 1 + w), in one call of 2B.

        Every prediction is affine in x_start at given x_t, so it may be mixed in any of them. A learned variance
        is the conditional one's.
        """
        assert self.labels is not None
        assert self.null_label is not None
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        with_label, without = self._output(torch.cat([x, x]), k, labels).float().chunk(2)
        channels = x.shape[1]
        value, without = with_label[:, :channels], without[:, :channels]
        return torch.cat([without + self.guidance_scale * (value - without), with_label[:, channels:]], dim=1)


def make_denoiser(
    network: Network,
    diffusion: GaussianDiffusion,
    settings: SamplingConfig,
    times: Times,
    labels: Tensor | None,
    null_label: int | None,
    device: torch.device | str,
) -> Denoiser:
    """The denoiser for the visited times [S]; raises SamplingError for labels [B] or guidance that can't work."""
    scale = settings.guidance_scale
    low, high = settings.guidance_interval or (0, diffusion.timesteps - 1)
    if low > high:
        raise SamplingError(f"sampling.guidance_interval: [{low}, {high}] is empty; give first and last t")
    if high >= diffusion.timesteps:
        raise SamplingError(
            f"sampling.guidance_interval: [{low}, {high}] reaches beyond the last t, {diffusion.timesteps - 1}"
        )
    if scale != 1 and (labels is None or null_label is None):
        raise SamplingError(
            f"sampling.guidance_scale: {scale} needs a class-conditional network with a null class, and labels; "
            "this one has none, use sampling.guidance_scale: 1"
        )
    of_x, of_value = (
        torch.tensor(weight[times], dtype=torch.float32, device=device)
        for weight in diffusion.x_start_weights(diffusion.prediction)
    )
    return Denoiser(
        network,
        diffusion,
        torch.as_tensor(times, device=device),
        (of_x, of_value),
        tuple(bool(scale != 1 and low <= t <= high) for t in times),
        scale,
        make_clip(settings.clip, settings.dynamic_quantile),
        None if labels is None else labels.to(device),
        null_label,
    )


def check_labels(labels: Tensor | None, null_label: int | None, batch: int) -> None:
    """Raises SamplingError unless labels is [batch] int64 with values up to null_label (the network's last class)."""
    if labels is None:
        if null_label is not None:
            raise SamplingError(
                f"labels are missing: the network is conditional on {null_label} classes; give one label for each "
                f"image, or {null_label} for no class"
            )
        return
    if null_label is None:
        raise SamplingError(
            "labels were given, but no null_label: leave them out for an unconditional network; for another, it is the "
            "number of classes"
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != (batch,):
        raise SamplingError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; one int64 for each of the {batch} "
            "images is needed"
        )
    wrong = labels[(labels < 0) | (labels > null_label)]
    if len(wrong):
        raise SamplingError(
            f"label {int(wrong[0])} is out of range; the classes are 0 to {null_label - 1}, and {null_label} is none"
        )


def make_clip(kind: str, quantile: float = 0.995) -> Callable[[Tensor], Tensor]:
    """What happens to x_start before it is used. kind: a value of sampling.clip."""
    if kind == "none":
        return lambda x_start: x_start
    if kind == "static":
        return lambda x_start: x_start.clamp(-1, 1)
    if kind == "dynamic":
        return lambda x_start: dynamic_threshold(x_start, quantile)
    raise ConfigError(f"sampling.clip: {kind!r} is unknown; choose from none, static, dynamic")


def dynamic_threshold(x_start: Tensor, quantile: float) -> Tensor:
    """Clips each image of [B, C, H, W] to ±s and divides by s, its quantile of |x_start|, at least 1.

    Saharia et al. 2022, section 2.3.
    """
    # By sorting: torch.quantile refuses more than 2^24 elements, which 86 images of 256 x 256 x 3 have.
    magnitude = x_start.abs().flatten(1).sort(dim=1).values
    position = quantile * (magnitude.shape[1] - 1)
    below = int(position)
    above = min(below + 1, magnitude.shape[1] - 1)
    s = torch.lerp(magnitude[:, below], magnitude[:, above], position - below).clamp(min=1)
    s = s.reshape(-1, *[1] * (x_start.ndim - 1))
    return x_start.clamp(-s, s) / s
