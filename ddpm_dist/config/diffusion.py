"""`diffusion:`, the process and the loss."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ddpm_dist.config.base import Fraction, Section

OWN_PREDICTION = {"ddpm": "eps", "edm": "edm", "flow": "velocity"}
OWN_TIMES = {"ddpm": "uniform", "edm": "log_normal", "flow": "uniform"}
"""What a process's paper takes, where a recipe leaves it open."""

PREDICTIONS = {
    "ddpm": ("eps", "x_start", "v", "x_prev"),
    "edm": ("edm", "eps", "x_start", "v", "velocity"),
    "flow": ("velocity", "x_start", "v", "edm"),
}

Sigma = Annotated[float, Field(gt=0)]


def _own(table: dict[str, str]) -> Any:
    return Field(default_factory=lambda found: table[found.get("process", "ddpm")])


class DiffusionConfig(Section):
    """The forward process, what the network predicts of it, and the loss."""

    process: Literal["ddpm", "edm", "flow"] = "ddpm"
    """ddpm: a table of betas (timesteps, schedule, …). edm: noise levels sigma_min to sigma_max, with the
    preconditioning of Karras et al. 2022. flow: the straight line from image to noise (flow matching)."""
    sigma_min: Sigma = 0.002
    """Of edm: the smallest noise level that samplers visit, in the images' unit [-1, 1]."""
    sigma_max: Sigma = 80.0
    """Of edm: the largest, where a chain starts."""
    sigma_data: Sigma = 0.5
    """The images' standard deviation in [-1, 1], by which edm scales the network's inputs and outputs."""
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
    prediction: Literal["eps", "x_start", "v", "x_prev", "velocity", "edm"] = _own(OWN_PREDICTION)
    """What the network gives; where it isn't said, the process's own: eps, edm (EDM's F) or velocity."""
    variance: Literal["fixedsmall", "fixedlarge", "learned", "learned_range"] = "fixedlarge"
    loss: Literal["simple", "vlb", "hybrid"] = "simple"
    vlb_weight: Annotated[float, Field(gt=0)] = 1e-3
    """Weight of the variational bound in the hybrid loss (Improved DDPM's lambda)."""
    weighting: Literal["none", "min_snr", "p2"] = "none"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    times: Literal["uniform", "log_normal"] = _own(OWN_TIMES)
    """How a training sample's time is distributed: uniform in t, or log-normal in sigma / alpha, which is EDM's, and of
    flow the logit-normal (SD3) and the skewed times (flow_matching). Where it isn't said: log_normal of edm alone."""
    time_mean: float = -1.2
    """Of log_normal: mean of log(sigma / alpha). EDM and flow_matching: -1.2, SD3: 0."""
    time_std: Sigma = 1.2
    """Of log_normal: its deviation. EDM and flow_matching: 1.2, SD3: 1."""
    t_sampling: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"
    """Each place's draw by itself, evenly spaced over the batch, or where losses are large, weighted."""
    label_dropout: Fraction = 0.0
    """Probability that a training sample's class is replaced by the null class (for guidance)."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last x_t holds no signal at all."""
        return self.process == "flow" or self.zero_terminal_snr or (self.betas is not None and self.betas[-1] == 1)


def check_diffusion(d: DiffusionConfig, num_classes: int | None) -> None:
    """A process that can be trained, with a network of so many classes; else ValueError."""
    _check_process(d)
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
    if d.process == "ddpm" and d.weighting != "none" and d.ends_in_noise:
        raise ValueError(
            f"diffusion.weighting: {d.weighting} gives the last t, whose SNR is 0 (zero_terminal_snr, or a last beta "
            "of 1), no weight; use weighting: none"
        )
    if d.label_dropout and not num_classes:
        raise ValueError("diffusion.label_dropout: needs model.num_classes")
    if d.process == "ddpm" and d.ends_in_noise and d.prediction == "eps":
        raise ValueError(
            "diffusion.prediction: eps says nothing about x_start at the last t, whose SNR is 0 (zero_terminal_snr, or "
            "a last beta of 1); use v or x_start"
        )
    if d.zero_terminal_snr and d.timesteps == 1:
        raise ValueError("diffusion.zero_terminal_snr: needs at least 2 diffusion.timesteps")


OF_PROCESS = {
    "timesteps": "ddpm", "schedule": "ddpm", "beta_start": "ddpm", "beta_end": "ddpm", "betas": "ddpm",
    "zero_terminal_snr": "ddpm", "sigma_min": "edm", "sigma_max": "edm",
}  # fmt: skip
"""Keys that mean something for one process alone."""


def _check_process(d: DiffusionConfig) -> None:
    """ValueError for what the process doesn't have."""
    for key, process in OF_PROCESS.items():
        if process != d.process and getattr(d, key) != type(d).model_fields[key].default:
            value = getattr(d, key)
            raise ValueError(f"diffusion.{key}: {value} is of process: {process}, not {d.process}; leave it out")
    if d.prediction not in PREDICTIONS[d.process]:
        raise ValueError(
            f"diffusion.prediction: {d.prediction} isn't one of diffusion.process: {d.process}; use one of "
            + ", ".join(PREDICTIONS[d.process])
        )
    if d.sigma_data != 0.5 and "edm" not in (d.process, d.prediction):
        raise ValueError(f"diffusion.sigma_data: {d.sigma_data} is of process or prediction edm; leave it out")
    if d.sigma_min >= d.sigma_max:
        raise ValueError(f"diffusion.sigma_min: {d.sigma_min} isn't less than diffusion.sigma_max: {d.sigma_max}")
    if d.process != "ddpm" and d.loss != "simple":
        raise ValueError(f"diffusion.loss: {d.loss} is a bound over the steps of process: ddpm; {d.process} has simple")
    if d.process != "ddpm" and d.variance not in ("fixedsmall", "fixedlarge"):
        raise ValueError(f"diffusion.variance: {d.variance} is learned by process: ddpm alone; leave it out")
    if (d.time_mean, d.time_std) != (-1.2, 1.2) and d.times != "log_normal":
        raise ValueError("diffusion.time_mean and time_std: of times: log_normal alone; leave them out")
    if d.process == "ddpm" and d.times != "uniform" and d.t_sampling == "loss_second_moment":
        raise ValueError(
            f"diffusion.t_sampling: loss_second_moment draws whole times by their losses, times: {d.times} by their "
            "noise; use one of them"
        )
