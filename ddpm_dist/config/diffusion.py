"""`diffusion:`, the process and the loss."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Fraction, Section


class DiffusionConfig(Section):
    """The forward process, what the network predicts of it, and the loss."""

    timesteps: Annotated[int, Field(ge=1, le=10**6)] = 1000
    schedule: Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "sigmoid_alpha_bar", "given"] = (
        "linear"
    )
    """Shape of beta (sigmoid: diffusers' one) or of alpha_bar (cosine, and sigmoid_alpha_bar of Jabri et al. 2022).
    scaled_linear and quadratic are two names of one shape."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """The betas themselves, for schedule: given."""
    zero_terminal_snr: bool = False
    prediction: Literal["eps", "x_start", "v", "x_prev"] = "eps"
    variance: Literal["fixedsmall", "fixedlarge", "learned", "learned_range"] = "fixedlarge"
    loss: Literal["simple", "vlb", "hybrid"] = "simple"
    vlb_weight: Annotated[float, Field(gt=0)] = 1e-3
    """Weight of the variational bound in the hybrid loss (Improved DDPM's lambda)."""
    weighting: Literal["none", "min_snr", "p2"] = "none"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    t_sampling: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"
    label_dropout: Fraction = 0.0
    """Probability that a training sample's class is replaced by the null class (for guidance)."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last x_t holds no signal at all."""
        return self.zero_terminal_snr or (self.betas is not None and self.betas[-1] == 1)


def check_diffusion(d: DiffusionConfig, num_classes: int | None) -> None:
    """A process that can be trained, with a network of so many classes; else ValueError."""
    if d.beta_start > d.beta_end:
        raise ValueError(f"diffusion.beta_start: {d.beta_start} is more than diffusion.beta_end: {d.beta_end}")
    if (d.schedule == "given") != (d.betas is not None):
        raise ValueError("diffusion.betas: needed with diffusion.schedule: given, and with nothing else")
    if d.betas is not None and len(d.betas) != d.timesteps:
        raise ValueError(f"diffusion.betas: {len(d.betas)} values for {d.timesteps} diffusion.timesteps")
    if d.betas is not None and 1 in d.betas[:-1]:
        raise ValueError(
            f"diffusion.betas: beta[{d.betas.index(1)}] is 1, after which no image is left; only the last may"
        )
    if d.variance in ("learned", "learned_range") and d.loss == "simple":
        raise ValueError(
            f"diffusion.loss: simple gives diffusion.variance: {d.variance} no gradient; use hybrid or vlb"
        )
    if d.loss == "hybrid" and d.variance not in ("learned", "learned_range"):
        raise ValueError(
            f"diffusion.loss: hybrid adds a term that trains the variance alone, and diffusion.variance: {d.variance} "
            "is fixed; use loss: simple or vlb, or variance: learned_range"
        )
    if d.weighting != "none" and d.loss == "vlb":
        raise ValueError(f"diffusion.weighting: {d.weighting} weighs the squared error, which loss: vlb doesn't have")
    if d.weighting != "none" and d.ends_in_noise:
        raise ValueError(
            f"diffusion.weighting: {d.weighting} gives the last t, whose SNR is 0 (zero_terminal_snr, or a last beta "
            "of 1), no weight; use weighting: none"
        )
    if d.label_dropout and not num_classes:
        raise ValueError("diffusion.label_dropout: needs model.num_classes")
    if d.ends_in_noise and d.prediction == "eps":
        raise ValueError(
            "diffusion.prediction: eps says nothing about x_start at the last t, whose SNR is 0 (zero_terminal_snr, or "
            "a last beta of 1); use v or x_start"
        )
    if d.zero_terminal_snr and d.timesteps == 1:
        raise ValueError("diffusion.zero_terminal_snr: needs at least 2 diffusion.timesteps")
