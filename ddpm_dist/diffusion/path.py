"""Paths from image to noise: x_t = alpha(t) x_0 + sigma(t) eps, with both derivatives, and what a network may predict.

All that the rest of this room multiplies by follows from these four numbers. Everything is arithmetic, in float64, on
numpy arrays and tensors alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ddpm_dist.diffusion.schedules import Float64s


class Level(NamedTuple):
    """A path at some times: alpha, sigma and their derivatives by t, of the times' shape (arrays or tensors)."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any


class Path(ABC):
    """alpha falls and sigma rises from `origin`, the image itself, over [first, last], where a network is asked."""

    origin: float
    """The time of x_0: alpha 1, sigma 0."""
    first: float
    last: float

    @abstractmethod
    def level(self, t: Any) -> Level:
        """At times t in [origin, last], float64."""

    @abstractmethod
    def time_of(self, ratio: Any) -> Any:
        """The time at which sigma / alpha is `ratio`, in [0, inf]: the inverse of the signal-to-noise ratio."""

    def asked(self, t: Tensor, sigma_data: float) -> tuple[Tensor | None, Tensor]:
        """(what x_t is multiplied by for the network or None for 1, what it is told of t), float64 [B] each."""
        return None, t

    def prior_std(self, t: float) -> float:
        """Deviation of the noise that a chain starts from at t."""
        return 1.0

    def log_snr(self, t: Float64s) -> Float64s:
        """log(alpha² / sigma²); infinite at the origin, and where there is no signal."""
        level = self.level(np.asarray(t, np.float64))
        with np.errstate(divide="ignore"):
            return 2 * (np.log(level.alpha) - np.log(level.sigma))


class Table(Path):
    """A list of alpha_bar (Ho et al. 2020) at times 0 … T - 1, with the image at -1; variance-preserving.

    Between whole times the angle of (alpha, sigma) is linear: so alpha² + sigma² = 1 everywhere, nothing is infinite at
    either end, and the derivatives are those of the piece that a time ends. At whole times, up to rounding, the table's
    own numbers.
    """

    origin = -1.0
    first = 0.0

    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        alpha_bar = np.append(1.0, np.asarray(alphas_cumprod, np.float64))
        self.last = float(len(alpha_bar) - 2)
        self._times = np.arange(-1.0, self.last + 1)
        self._angles = np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))

    def level(self, t: Float64s) -> Level:
        """At times t [...] float64."""
        angle = np.interp(t, self._times, self._angles)
        piece = np.clip(np.ceil(np.asarray(t, np.float64)).astype(np.int64), 0, int(self.last))
        speed = np.diff(self._angles)[piece]
        # By complement near the end without signal, whose cosine would be 6e-17.
        alpha = np.where(angle == np.pi / 2, 0.0, np.cos(angle))
        return Level(alpha, np.sin(angle), -np.sin(angle) * speed, alpha * speed)

    def time_of(self, ratio: Float64s) -> Float64s:
        """t [...] float64, in [-1, T - 1]."""
        return np.interp(np.arctan(ratio), self._angles, self._times)


class Exploding(Path):
    """EDM's (Karras et al. 2022): alpha = 1, sigma = t, in [sigma_min, sigma_max]."""

    origin = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.first, self.last = sigma_min, sigma_max

    def level(self, t: Any) -> Level:
        """alpha 1 and sigma t, with derivatives 0 and 1."""
        return Level(t * 0 + 1, t, t * 0, t * 0 + 1)

    def time_of(self, ratio: Any) -> Any:
        """The ratio itself."""
        return ratio

    def asked(self, t: Tensor, sigma_data: float) -> tuple[Tensor | None, Tensor]:
        """Their c_in and c_noise (table 1), [B] each."""
        return (t**2 + sigma_data**2) ** -0.5, t.log() / 4

    def prior_std(self, t: float) -> float:
        """sigma, beside which the data's variance is left out (their algorithm 1)."""
        return t


class Straight(Path):
    """Flow matching (Lipman et al. 2022) and rectified flow (Liu et al. 2022): alpha = 1 - t, sigma = t, t in [0, 1].

    Time runs from image to noise, as everywhere here and in diffusers; in flow_matching's library it is 1 - t.
    """

    origin = 0.0
    last = 1.0

    def __init__(self, first: float = 1e-3) -> None:
        self.first = first
        """Samplers' smallest time, whose noise is an eighth of a grey level; training goes down to 0."""

    def level(self, t: Any) -> Level:
        """alpha 1 - t and sigma t, with derivatives -1 and 1."""
        return Level(1 - t, t, t * 0 - 1, t * 0 + 1)

    def asked(self, t: Tensor, sigma_data: float) -> tuple[Tensor | None, Tensor]:
        """t in thousandths [B], as diffusers has it, so that the sinusoids see it."""
        return None, 1000 * t

    def time_of(self, ratio: Any) -> Any:
        """ratio / (1 + ratio), and 1 for infinity."""
        return 1 - 1 / (1 + ratio)


# What a network may predict: a x_0 + b eps, with (a, b) a function of the level and of the data's deviation

Parts = Callable[[Level, float], tuple[Any, Any]]


def _edm(level: Level, sigma_data: float) -> tuple[Any, Any]:
    root = (level.alpha**2 * sigma_data**2 + level.sigma**2) ** 0.5
    return level.sigma / (sigma_data * root), -level.alpha * sigma_data / root


PREDICTIONS: dict[str, Parts] = {
    "eps": lambda level, _: (level.alpha * 0, level.alpha * 0 + 1),
    "x_start": lambda level, _: (level.alpha * 0 + 1, level.alpha * 0),
    "v": lambda level, _: (-level.sigma, level.alpha),  # Salimans & Ho 2022, appendix D
    "velocity": lambda level, _: (level.d_alpha, level.d_sigma),  # dx_t / dt along a pair (Lipman et al. 2022)
    "score": lambda level, _: (level.alpha * 0, -1 / level.sigma),  # the gradient of log q(x_t)
    "edm": _edm,  # F of Karras et al. 2022, equation 7, and for any alpha: what has unit variance, as has its input
}


def x_start_weights(level: Level, prediction: str, sigma_data: float = 1.0) -> tuple[Any, Any]:
    """(c, d) of x_0 = c x_t + d prediction, EDM's c_skip and c_out: the inverse of PREDICTIONS at x_t."""
    a, b = PREDICTIONS[prediction](level, sigma_data)
    determinant = level.alpha * b - level.sigma * a
    return b / determinant + 0.0, -level.sigma / determinant  # + 0.0: no zero is negative


PAIRS: dict[str, Callable[[Level, str, float], tuple[Any, Any]]] = {
    "scales": lambda level, _, __: (level.alpha, level.sigma),
    "prediction": lambda level, prediction, sigma_data: PREDICTIONS[prediction](level, sigma_data),
    "x_start": x_start_weights,
}
"""What training multiplies by, of (level, prediction, sigma_data): x_0 and eps in x_t, x_0 and eps in the prediction,
x_t and the prediction in x_0."""


def ode_weights(level: Level) -> tuple[Any, Any]:
    """(c, d) of dx/dt = c x + d x_0, the probability-flow ODE (Song et al. 2021): alpha' x_0 + sigma' eps."""
    return level.d_sigma / level.sigma, level.d_alpha - level.alpha * level.d_sigma / level.sigma
