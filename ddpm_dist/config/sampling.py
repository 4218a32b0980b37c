"""`sampling:` and `evaluation:`, how images are made of a snapshot, and what they are compared by."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Count, Fraction, Free, Positive, Precision, Section, Url, check_span
from ddpm_dist.config.diffusion import DiffusionConfig

Time = Count | Annotated[float, Field(ge=0)]


class SamplingConfig(Section):
    """The reverse process, and how a job of images is cut into units."""

    sampler: Free[Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "unipc"]] = "ddpm"
    steps: Free[Positive | None] = None
    """Times visited by the sampler; none: all of them, which a continuous process hasn't."""
    spacing: Free[Literal["uniform", "quadratic", "trailing", "log_snr", "rho"]] = "uniform"
    """How the visited times are spread, where they are not all; log_snr suits dpmpp_2m, unipc and heun, rho (EDM's own)
    process edm, trailing a flow."""
    eta: Free[Fraction | None] = None
    """DDIM's eta: 0 deterministic (the default), 1 as ancestral sampling."""
    churn: Free[Annotated[float, Field(ge=0)]] = 0.0
    """EDM's S_churn, for heun: noise added over the chain; 0 is deterministic."""
    churn_interval: Free[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None] = None
    """[S_tmin, S_tmax]: the sigma / alpha at which noise is added; none: everywhere."""
    churn_noise: Free[Annotated[float, Field(gt=0)]] = 1.0
    """S_noise: the added noise's deviation."""
    clip: Free[Literal["none", "static", "dynamic"]] = "static"
    """What happens to x_start before each step: nothing, clip to [-1, 1], or dynamic thresholding."""
    dynamic_quantile: Free[Fraction] = 0.995
    guidance_scale: Free[Annotated[float, Field(ge=0)]] = 1.0
    """Guidance, classifier-free or by `guide`: 1 is none, larger is stronger."""
    guidance_interval: Free[tuple[Time, Time] | None] = None
    """First and last t in which guidance is active; none: always."""
    guide: Free[Url | None] = None
    """Autoguidance (Karras et al. 2024): URL of a worse snapshot of the same process, an earlier or smaller one, away
    from which guidance_scale leads; none: guidance is classifier-free."""
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
    _check_extras(sampling)
    check_span("sampling.guidance_interval", sampling.guidance_interval)
    if d.process != "ddpm":
        return _check_continuous(sampling, d)
    if sampling.guidance_interval and any(t != int(t) for t in sampling.guidance_interval):
        raise ValueError(f"sampling.guidance_interval: {list(sampling.guidance_interval)}; process: ddpm has whole t")
    if sampling.steps and sampling.steps > d.timesteps:
        raise ValueError(
            f"sampling.steps: {sampling.steps} can't be taken out of {d.timesteps} diffusion.timesteps; "
            f"use 1 to {d.timesteps}"
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


def _check_extras(sampling: SamplingConfig) -> None:
    """ValueError for a setting that the sampler doesn't have."""
    if sampling.eta is not None and sampling.sampler != "ddim":
        raise ValueError(
            f"sampling.eta: {sampling.eta} has no meaning for sampling.sampler: {sampling.sampler}; only ddim has eta, "
            "leave it out"
        )
    if sampling.churn and sampling.sampler != "heun":
        raise ValueError(
            f"sampling.churn: {sampling.churn} has no meaning for sampling.sampler: {sampling.sampler}; only heun is "
            "churned, leave it out"
        )
    if not sampling.churn and (sampling.churn_interval is not None or sampling.churn_noise != 1):
        raise ValueError("sampling.churn_interval and churn_noise: of sampling.churn, which is 0; leave them out")
    check_span("sampling.churn_interval", sampling.churn_interval)
    if sampling.guide is not None and sampling.guidance_scale == 1:
        raise ValueError("sampling.guide: does nothing with sampling.guidance_scale: 1; give a larger one, such as 2")


def _check_continuous(sampling: SamplingConfig, d: DiffusionConfig) -> None:
    """ValueError for settings that a process in continuous time doesn't have."""
    if sampling.steps is None:
        own = "rho, sampler: heun, steps: 18" if d.process == "edm" else "trailing, sampler: heun, steps: 50"
        raise ValueError(
            f"sampling.steps: none means all of them, and diffusion.process: {d.process} has no list of times; say how "
            f"many, such as sampling.spacing: {own}"
        )
    last = d.sigma_max if d.process == "edm" else 1.0
    if sampling.guidance_interval and sampling.guidance_interval[1] > last:
        raise ValueError(
            f"sampling.guidance_interval: {list(sampling.guidance_interval)} reaches beyond the last t, {last:g}; give "
            "first and last t"
        )
