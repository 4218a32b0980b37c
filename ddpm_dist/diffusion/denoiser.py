"""The network as a sampler sees it: an estimate of x_start at each visited time.

Guidance, conversion from what the network predicts, and clipping happen here, so samplers hear of none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.process import Process, Times
from ddpm_dist.diffusion.schedules import Float64s
from ddpm_dist.errors import ConfigError, SamplingError

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x [B,C,H,W], t [B], labels [B] int64 or None) -> [B,C,H,W], or [B,2C,H,W] with a learned variance."""


@dataclass(frozen=True)
class Denoiser:
    """x_start, and the variance channels if there are any, at the k-th time."""

    network: Network
    diffusion: Process
    times: Tensor
    """[S] on the device of the images: what the network is told of each time."""
    factors: Tensor | None
    """[S] float32: what x_t is multiplied by for the network (EDM's c_in); None: 1."""
    weights: tuple[Tensor, Tensor]
    """[S] float32 each: x_start = first · x_t + second · prediction."""
    guided: tuple[bool, ...]
    """[S]: whether guidance is active."""
    guidance_scale: float
    clip: Callable[[Tensor], Tensor]
    labels: Tensor | None
    null_label: int | None
    guide: "Denoiser | None" = None
    """Of autoguidance; None: guidance is classifier-free."""

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """x: [B,C,H,W] float32 at times[k]. Returns x_start [B,C,H,W] and variance values [B,C,H,W] or None."""
        guided, guide = self.guided[k], self.guide
        output = self._free_of_class(x, k) if guided and guide is None else self._output(x, k, self.labels)
        x_start, variance_values = self._x_start(output, x, k)
        if guided and guide is not None:
            # Karras et al. 2024, equation 3: away from what a worse network gives
            worse, _ = guide._x_start(guide._output(x, k, guide.labels), x, k)
            x_start = worse + self.guidance_scale * (x_start - worse)
        return self.clip(x_start), variance_values

    def _x_start(self, output: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        value, variance_values = self.diffusion.split(output.float(), x.shape[1])
        of_x, of_value = self.weights
        return of_x[k] * x + of_value[k] * value, variance_values

    def _output(self, x: Tensor, k: int, labels: Tensor | None) -> Tensor:
        x = x if self.factors is None else self.factors[k] * x
        return self.network(x, self.times[k].expand(len(x)), labels)

    def _free_of_class(self, x: Tensor, k: int) -> Tensor:
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
    diffusion: Process,
    settings: SamplingConfig,
    times: Times,
    labels: Tensor | None,
    null_label: int | None,
    device: torch.device | str,
    guide: "Guide | None" = None,
) -> Denoiser:
    """The denoiser for the times [S]; raises SamplingError for labels [B] or guidance that can't work."""
    scale, path = settings.guidance_scale, diffusion.path
    low, high = settings.guidance_interval or (path.origin, path.last)
    if low > high:
        raise SamplingError(f"sampling.guidance_interval: [{low}, {high}] is empty; give first and last t")
    if high > path.last:
        raise SamplingError(f"sampling.guidance_interval: [{low}, {high}] reaches beyond the last t, {path.last:g}")
    if settings.guide is None and scale != 1 and (labels is None or null_label is None):
        raise SamplingError(
            f"sampling.guidance_scale: {scale} needs a class-conditional network with a null class, and labels; "
            "this one has none, use sampling.guidance_scale: 1, or sampling.guide: URL of a worse snapshot"
        )
    labels = None if labels is None else labels.to(device)
    worse = None
    if settings.guide is not None:
        found = check_guide(guide, diffusion, null_label)
        known, never = None if found.null_label is None else labels, (False,) * len(times)
        rest = (never, 1.0, make_clip("none"), known, None, None)
        worse = _denoiser(found.network, found.diffusion, times, device, *rest)
    guided = tuple(bool(scale != 1 and low <= t <= high) for t in times)
    clip = make_clip(settings.clip, settings.dynamic_quantile)
    return _denoiser(network, diffusion, times, device, guided, scale, clip, labels, null_label, worse)


class Guide(NamedTuple):
    """A worse network of the same images: trained less, or smaller (Karras et al. 2024)."""

    network: Network
    diffusion: Process
    null_label: int | None
    """Its number of classes; None: it knows none."""


def check_guide(guide: Guide | None, diffusion: Process, null_label: int | None) -> Guide:
    """The guide; SamplingError unless it walks the same path and knows the same classes, if any."""
    if guide is None:
        raise SamplingError("sampling.guide: its network was not given; ddpm-sample reads it")
    ours, theirs = diffusion.path, guide.diffusion.path
    times = diffusion.nearest(np.linspace(ours.first, ours.last, 64))
    apart = diffusion.discrete != guide.diffusion.discrete or ours.last != theirs.last
    if apart or not np.allclose(diffusion.level(times)[:2], guide.diffusion.level(times)[:2], rtol=1e-6):
        raise SamplingError(
            "sampling.guide: its process has other noise levels than the snapshot's (diffusion.process, schedule, "
            "timesteps, sigma_max); a guide is an earlier or smaller snapshot of the same process"
        )
    if guide.null_label not in (None, null_label):
        raise SamplingError(
            f"sampling.guide: its network knows {guide.null_label} classes, the snapshot's {null_label or 'none'}"
        )
    return guide


def _denoiser(network: Network, diffusion: Process, times: Times, device: torch.device | str, *rest: Any) -> Denoiser:
    """With what each time needs of the process, on the device. rest: as `Denoiser` has it after `weights`."""

    def on_device(values: Float64s) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    factors, told = diffusion.inputs(times)
    of_x, of_value = diffusion.weights(times)
    names = torch.as_tensor(told, device=device) if diffusion.discrete else on_device(told)
    scaled = None if factors is None else on_device(factors)
    return Denoiser(network, diffusion, names, scaled, (on_device(of_x), on_device(of_value)), *rest)


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
