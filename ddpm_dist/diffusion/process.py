"""What all processes share: a path, what the network predicts of it, and how the network is asked."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_dist.diffusion.path import Level, Path
from ddpm_dist.diffusion.schedules import Float64s
from ddpm_dist.errors import ConfigError

Times = NDArray[Any]
"""[S], falling: int64 of a discrete process, float64 of a continuous one."""

LEARNED = ("learned", "learned_range")


class ReverseRows(NamedTuple):
    """p(x_next | x) of the ancestral chain, for each step: mean = first · x_start + second · x, and its deviation."""

    of_x_start: Float64s
    of_x: Float64s
    deviation: Float64s
    """[S], where it is fixed."""
    learned: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(variance values, x, [1] int64: steps that follow) -> deviation [B,C,H,W], where it is learned."""


class Process(ABC):
    """A Gaussian process of images and what a network is asked about it: constants alone, shared and pickled freely.

    Times t are [B] tensors: int64 in 0..T-1 (`discrete`), or float64 in the path's own unit.
    """

    discrete: bool
    path: Path
    prediction: str
    """What the network's first C channels mean."""
    variance: str
    """Of the reverse process; the learned ones read C further channels."""

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives 2C channels."""
        return self.variance in LEARNED

    # For samplers: float64 arrays of times that are known beforehand

    @abstractmethod
    def level(self, times: Times) -> Level:
        """alpha, sigma and their derivatives: [S] float64 each."""

    @abstractmethod
    def weights(self, times: Times, prediction: str | None = None) -> tuple[Float64s, Float64s]:
        """float64 [S] each: x_start = first · x_t + second · prediction (default: this process's own)."""

    @abstractmethod
    def reverse_rows(self, times: Times) -> "ReverseRows":
        """Of the ancestral chain over these times."""

    @abstractmethod
    def nearest(self, times: Float64s) -> Times:
        """The times that the network knows, nearest to these."""

    @abstractmethod
    def times_of(self, lambdas: Float64s) -> Times:
        """The times that the network knows, where log(alpha / sigma) is nearest to these."""

    def inputs(self, times: Times) -> tuple[Float64s | None, Float64s | Times]:
        """(factors of x_t or None for 1, what the network is told of the time), [S] each."""
        return None, times

    def forward_scales(self, earlier: Level, later: Level) -> tuple[float, float]:
        """(r, s) of x_later = r x_earlier + s eps: q between two times."""
        ratio = float(later.alpha / earlier.alpha)
        return ratio, float(later.sigma**2 - (ratio * earlier.sigma) ** 2) ** 0.5

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last x_t holds no signal at all."""
        return bool(self.level(self.nearest(np.array([self.path.last]))).alpha[0] == 0)

    # For training: tensors of times that were drawn

    @abstractmethod
    def pair(self, of: str, t: Tensor, like: Tensor, prediction: str = "eps") -> tuple[Tensor, Tensor]:
        """Two numbers at t [B], of path.PAIRS: [B,1,…] each, in the precision of `like`, on its device."""

    @abstractmethod
    def snr_at(self, t: Tensor) -> Tensor:
        """alpha² / sigma² at t: [B] float32."""

    def call(self, network: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the network gives for x_t [B,C,H,W] at t [B]."""
        return network(x_t, t, labels)

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) from standard normal eps (Ho et al. 2020, equation 4): [B,C,H,W]."""
        signal, noise = self.pair("scales", t, x_start)
        return signal * x_start + noise * eps

    def target(self, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """[B, C, H, W]: what the network is trained to give for x_t = q_sample(x_start, t, eps), by this prediction."""
        if self.prediction == "eps":
            return eps
        return x_start if self.prediction == "x_start" else self.from_x_start(x_start, x_t, t, self.prediction, eps)

    def to_x_start(self, value: Tensor, x_t: Tensor, t: Tensor, prediction: str | None = None) -> Tensor:
        """x_start from a prediction (default: this process's own) at x_t: [B,C,H,W]. Inverse of `from_x_start`."""
        of_x_t, of_value = self.pair("x_start", t, x_t, prediction or self.prediction)
        return of_x_t * x_t + of_value * value

    def from_x_start(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: str, eps: Tensor | None = None
    ) -> Tensor:
        """The prediction that means `x_start` at x_t: [B,C,H,W].

        eps: the noise, where it is known; else (x_t - alpha x_start) / sigma, which loses some bits at small t.
        """
        if prediction == "x_start":
            return x_start
        if eps is None:
            signal, noise = self.pair("scales", t, x_t)
            eps = (x_t - signal * x_start) / noise
        if prediction == "eps":
            return eps
        of_x_start, of_eps = self.pair("prediction", t, x_t, prediction)
        return of_x_start * x_start + of_eps * eps

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """(prediction [B,C,H,W], variance values or None) of the network's output, at least float32."""
        expected = channels * (2 if self.learns_variance else 1)
        if output.shape[1] != expected:
            raise ConfigError(
                f"the network gives {output.shape[1]} channels for images of {channels}, but diffusion.variance: "
                f"{self.variance} needs {expected}; use a network that was built for it"
            )
        if output.dtype != torch.float64:
            output = output.float()
        if not self.learns_variance:
            return output, None
        value, variance_values = output.chunk(2, dim=1)
        return value, variance_values
