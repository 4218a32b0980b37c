"""Processes in continuous time: EDM's and the straight path of flow matching; and which processes there are."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion import path
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.path import Exploding, Level, Path, Straight
from ddpm_dist.diffusion.process import Process, ReverseRows, Times
from ddpm_dist.diffusion.schedules import Float64s
from ddpm_dist.errors import ConfigError

OWN = {"edm": "edm", "flow": "velocity"}
"""What each process's paper has its network predict."""
PREDICTIONS = ("edm", "velocity", "v", "eps", "x_start")
VARIANCES = ("fixedsmall", "fixedlarge")


class ContinuousDiffusion(Process):
    """A path in continuous time; t is [B] float64, of `edm` sigma in [sigma_min, sigma_max], of `flow` in [0, 1].

    name: edm or flow. prediction: one of PREDICTIONS; None: the paper's own. variance: of ancestral sampling.
    sigma_data: the data's deviation, by which EDM scales what goes in and comes out (their table 1).
    Raises ConfigError on unknown names, impossible sigmas, and eps of flow (x_1 = eps holds nothing of x_start).
    """

    discrete = False

    def __init__(
        self,
        name: str,
        prediction: str | None = None,
        variance: str = "fixedlarge",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
    ) -> None:
        if name not in OWN:
            raise ConfigError(f"diffusion.process: {name!r} is unknown; choose from {', '.join(PROCESSES)}")
        self.name, self.prediction, self.variance = name, prediction or OWN[name], variance
        if self.prediction not in PREDICTIONS or (name, self.prediction) == ("flow", "eps"):
            known = ", ".join(p for p in PREDICTIONS if (name, p) != ("flow", "eps"))
            raise ConfigError(
                f"diffusion.prediction: {self.prediction} isn't known of diffusion.process: {name}; use one of {known}"
            )
        if variance not in VARIANCES:
            raise ConfigError(
                f"diffusion.variance: {variance} isn't known of diffusion.process: {name}; use {' or '.join(VARIANCES)}"
            )
        if not (0 < sigma_min < sigma_max and sigma_data > 0):
            raise ConfigError(
                f"diffusion.sigma_min: {sigma_min}, sigma_max: {sigma_max} and sigma_data: {sigma_data}; "
                "0 < sigma_min < sigma_max and 0 < sigma_data are needed"
            )
        self.path: Path = Exploding(sigma_min, sigma_max) if name == "edm" else Straight()
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    @classmethod
    def from_config(cls, cfg: DiffusionConfig) -> "ContinuousDiffusion":
        """The process that a recipe describes."""
        return cls(cfg.process, cfg.prediction, cfg.variance, cfg.sigma_min, cfg.sigma_max, cfg.sigma_data)

    # For samplers

    def level(self, times: Times) -> Level:
        """The path's."""
        return self.path.level(times)

    def nearest(self, times: Float64s) -> Times:
        """These themselves: the network knows all."""
        return times

    def times_of(self, lambdas: Float64s) -> Times:
        """Exactly."""
        return np.asarray(self.path.time_of(np.exp(-lambdas)), np.float64)

    def weights(self, times: Times, prediction: str | None = None) -> tuple[Float64s, Float64s]:
        """EDM's c_skip and c_out, or their like: float64 [S] each."""
        return path.x_start_weights(self.level(times), prediction or self.prediction, self.sigma_data)

    def inputs(self, times: Times) -> tuple[Float64s | None, Float64s]:
        """As the path asks its network."""
        factor, told = self.path.asked(torch.from_numpy(times), self.sigma_data)
        return None if factor is None else factor.numpy(), told.numpy()

    def reverse_rows(self, times: Times) -> ReverseRows:
        """q(x_next | x_t, x_0), with its own variance (fixedsmall) or that of q(x_t | x_next) (fixedlarge)."""
        here, there = self.level(times), self.level(np.append(times[1:], self.path.origin))
        ratio = here.alpha / there.alpha
        added = here.sigma**2 - (ratio * there.sigma) ** 2  # the variance of q(x_t | x_next)
        share = (there.sigma / here.sigma) ** 2
        variance = added * (share if self.variance == "fixedsmall" else 1.0)
        return ReverseRows(there.alpha * added / here.sigma**2, ratio * share, variance**0.5)

    # For training

    def pair(self, of: str, t: Tensor, like: Tensor, prediction: str = "eps") -> tuple[Tensor, Tensor]:
        """Computed in float64, then rounded: [B,1,…] each."""
        first, second = path.PAIRS[of](self.path.level(t.double()), prediction, self.sigma_data)
        return _column(first, like), _column(second, like)

    def snr_at(self, t: Tensor) -> Tensor:
        """alpha² / sigma²: [B] float32."""
        level = self.path.level(t.double())
        return ((level.alpha / level.sigma) ** 2).float()

    def call(self, network: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the network gives for c_in x_t and c_noise, float32 [B]."""
        factor, told = self.path.asked(t.double(), self.sigma_data)
        return network(x_t if factor is None else _column(factor, x_t) * x_t, told.float(), labels)


def _column(values: Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(dtype).reshape(-1, *[1] * (like.ndim - 1))


PROCESSES: dict[str, Callable[[DiffusionConfig], Process]] = {
    "ddpm": GaussianDiffusion.from_config,
    "edm": ContinuousDiffusion.from_config,
    "flow": ContinuousDiffusion.from_config,
}


def make_process(cfg: DiffusionConfig) -> Process:
    """The process that a recipe describes; ConfigError for numbers that make none."""
    return PROCESSES[cfg.process](cfg)
