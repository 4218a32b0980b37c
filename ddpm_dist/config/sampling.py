"""`sampling:` and `evaluation:`, how images are made of a snapshot, and what they are compared by."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Count, Fraction, Free, Positive, Precision, Section, Url, check_span
from ddpm_dist.config.diffusion import DiffusionConfig


class SamplingConfig(Section):
    """The reverse process, and how a job of images is cut into units."""

    sampler: Free[Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc"]] = "ddpm"
    steps: Free[Positive | None] = None
    """Times visited by the sampler; none: all of them."""
    spacing: Free[Literal["uniform", "quadratic", "trailing", "log_snr"]] = "uniform"
    """How the visited times are spread, where they are not all; log_snr suits dpmpp_2m, unipc and heun."""
    eta: Free[Fraction | None] = None
    """DDIM's eta: 0 deterministic (the default), 1 as ancestral sampling."""
    clip: Free[Literal["none", "static", "dynamic"]] = "static"
    """What happens to x_start before each step: nothing, clip to [-1, 1], or dynamic thresholding."""
    dynamic_quantile: Free[Fraction] = 0.995
    guidance_scale: Free[Annotated[float, Field(ge=0)]] = 1.0
    """Classifier-free guidance: 1 is none, larger is stronger."""
    guidance_interval: Free[tuple[Count, Count] | None] = None
    """First and last t in which guidance is active; none: always."""
    batch_size: Free[Positive | None] = None
    """Images in one forward pass; none: found by memory once and fixed in the job's manifest."""
    precision: Free[Precision] = "fp32"
    unit_size: Free[Positive] = 256
    """Consecutive images in one output shard, the unit of work."""
    format: Free[Literal["png", "raw"]] = "png"


class EvaluationConfig(Section):
    """Which snapshots are evaluated, and by what."""

    every: Free[Positive | None] = None
    """Evaluate each snapshot at a multiple of so many steps, in a Ray job of its own; none: never."""
    num_samples: Free[Positive] = 10000
    metrics: Free[Annotated[tuple[str, ...], Field(min_length=1)]] = ("frechet_pixel", "frechet_lite0")
    networks: Free[dict[str, Url]] = {}  # noqa: RUF012 - pydantic copies it
    """Weights of feature networks by name, as `--network` of ddpm-evaluate: inception, or a TorchScript module."""


def check_sampling(sampling: SamplingConfig, d: DiffusionConfig) -> None:
    """A sampler that can walk the process back; else ValueError."""
    if sampling.steps and sampling.steps > d.timesteps:
        raise ValueError(
            f"sampling.steps: {sampling.steps} can't be taken out of {d.timesteps} diffusion.timesteps; "
            f"use 1 to {d.timesteps}"
        )
    if sampling.eta is not None and sampling.sampler != "ddim":
        raise ValueError(
            f"sampling.eta: {sampling.eta} has no meaning for sampling.sampler: {sampling.sampler}; only ddim has eta, "
            "leave it out"
        )
    if sampling.guidance_interval and sampling.guidance_interval[1] >= d.timesteps:
        raise ValueError(
            f"sampling.guidance_interval: {list(sampling.guidance_interval)} reaches beyond the last t, "
            f"{d.timesteps - 1}; give first and last t"
        )
    if d.ends_in_noise and sampling.steps and sampling.spacing == "quadratic":
        raise ValueError(
            "sampling.spacing: quadratic doesn't start at the last t, as a process needs whose last SNR is 0 "
            "(zero_terminal_snr, or a last beta of 1); use uniform, trailing or log_snr"
        )
    if d.variance == "learned" and sampling.sampler == "ddpm" and (sampling.steps or d.timesteps) < d.timesteps:
        raise ValueError(
            f"sampling.steps: {sampling.steps}; diffusion.variance: learned is that of single steps, not of longer "
            "ones; use all steps, another sampler, or learned_range"
        )
    check_span("sampling.guidance_interval", sampling.guidance_interval)
