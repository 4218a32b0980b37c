"""The paper's process, on a table of betas: forward process q and reverse process p (Ho, Jain & Abbeel 2020).

Equation numbers are Ho et al.'s. Constants are computed in float64 and cast at use: float32 for images of
any precision up to float32, float64 for float64 images.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion import path
from ddpm_dist.diffusion.path import Level, Table
from ddpm_dist.diffusion.process import Process, ReverseRows, Times
from ddpm_dist.diffusion.schedules import Float64s, check_betas, make_betas
from ddpm_dist.errors import ConfigError

PREDICTIONS = ("eps", "x_start", "v", "x_prev")
VARIANCES = ("fixedsmall", "fixedlarge", "learned", "learned_range")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t), and the image that it was computed from; all [B,C,H,W] but a fixed variance, [B,1,1,1]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


class GaussianDiffusion(Process):
    """Both processes over T steps.

    betas: [T] in (0, 1], any sequence. prediction: what the network's first C channels mean, one of PREDICTIONS.
    variance: of the reverse process, one of VARIANCES; the learned ones read C further channels.
    Raises ConfigError on unknown names, impossible betas, and eps with a last beta of 1 (x_T = eps holds nothing
    of x_start, so it can't be found from eps).

    float64 [T] arrays: betas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod,
    sqrt_one_minus_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
    posterior_mean_coef2, fixed_log_variance (of fixedlarge or fixedsmall), log_betas, snr.
    """

    discrete = True

    def __init__(self, betas: ArrayLike, prediction: str = "eps", variance: str = "fixedlarge") -> None:
        if prediction not in PREDICTIONS:
            raise ConfigError(f"diffusion.prediction: {prediction!r} is unknown; choose from {', '.join(PREDICTIONS)}")
        if variance not in VARIANCES:
            raise ConfigError(f"diffusion.variance: {variance!r} is unknown; choose from {', '.join(VARIANCES)}")
        self.prediction, self.variance = prediction, variance
        self.betas = check_betas(betas)
        if self.zero_terminal_snr and prediction == "eps":
            raise ConfigError(
                "diffusion.prediction: eps says nothing about x_start where alphas_cumprod is 0 (zero_terminal_snr); "
                "use v or x_start"
            )
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.path = Table(self.alphas_cumprod)

        # Equations 6 and 7. The posterior's variance is 0 at t = 0, where the logarithm takes its neighbour's.
        rest = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / rest
        first = self.posterior_variance[1:2] if self.timesteps > 1 else self.betas[:1]
        self.posterior_log_variance_clipped = np.log(np.concatenate([first, self.posterior_variance[1:]]))
        self.log_betas = np.log(self.betas)
        large = np.log(np.concatenate([first, self.betas[1:]]))
        self.fixed_log_variance = large if variance == "fixedlarge" else self.posterior_log_variance_clipped
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    @classmethod
    def from_config(cls, cfg: DiffusionConfig) -> "GaussianDiffusion":
        """The process that a recipe describes; ConfigError for betas that make none."""
        betas = make_betas(cfg.schedule, cfg.timesteps, cfg.beta_start, cfg.beta_end, cfg.betas, cfg.zero_terminal_snr)
        return cls(betas, cfg.prediction, cfg.variance)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.betas, self.prediction, self.variance)

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_T holds no signal at all."""
        return bool(self.betas[-1] == 1)

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The constant `name` at times t [B] int64: [B,1,…] on the device of `like`, to be broadcast against it."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (name, like.device, dtype)
        if key not in self._tables:
            self._tables[key] = torch.tensor(getattr(self, name), dtype=dtype, device=like.device)
        return self._tables[key][t].reshape(-1, *[1] * (like.ndim - 1))

    # The forward process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B,C,H,W] and variance [B,1,1,1] of q(x_t | x_0), equation 4."""
        variance = self.at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        return self.at("sqrt_alphas_cumprod", t, x_start) * x_start, variance

    def q_step(self, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_{t-1}), equation 2, all [B, C, H, W], t [B]; x_{-1} is the image."""
        beta = self.at("betas", t, x_prev)
        return torch.sqrt(1 - beta) * x_prev + torch.sqrt(beta) * eps

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B,C,H,W], variance and clipped log-variance [B,1,1,1] of q(x_{t-1} | x_t, x_0), equations 6 and 7."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self.at("posterior_variance", t, x_t), self.at("posterior_log_variance_clipped", t, x_t)

    # What the network predicts

    def level(self, times: Times) -> Level:
        """At whole times [S]: the table's own alpha and sigma, and the derivatives of `Table`."""
        between = self.path.level(times)
        signal, noise = self.sqrt_alphas_cumprod[times], self.sqrt_one_minus_alphas_cumprod[times]
        return Level(signal, noise, between.d_alpha, between.d_sigma)

    def nearest(self, times: Float64s) -> Times:
        """Whole times."""
        return np.clip(np.round(times), 0, self.timesteps - 1).astype(np.int64)

    def times_of(self, lambdas: Float64s) -> Times:
        """Whole times, by distance in lambda."""
        return np.abs(self._lambdas()[:, None] - lambdas).argmin(axis=0)

    def _lambdas(self) -> Float64s:
        with np.errstate(divide="ignore"):
            return np.asarray(0.5 * np.log(self.snr))

    def weights(self, times: Times, prediction: str | None = None) -> tuple[Float64s, Float64s]:
        """float64 [S] each: x_start = first · x_t + second · prediction."""
        of_x_t, of_prediction = self.x_start_weights(prediction or self.prediction)
        return of_x_t[times], of_prediction[times]

    def pair(self, of: str, t: Tensor, like: Tensor, prediction: str = "eps") -> tuple[Tensor, Tensor]:
        """From tables that are made where they are first asked for: [B,1,…] each."""
        names = [f"_{of}_{part}_{prediction}" for part in ("first", "second")]
        if not hasattr(self, names[0]):
            everywhere = self.level(np.arange(self.timesteps))
            found = self.x_start_weights(prediction) if of == "x_start" else path.PAIRS[of](everywhere, prediction, 1.0)
            vars(self).update(zip(names, found, strict=True))
        first, second = (self.at(name, t, like) for name in names)
        return first, second

    def snr_at(self, t: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar): [B] float32."""
        return self.at("snr", t, torch.empty(0, device=t.device))

    def from_x_start(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: str, eps: Tensor | None = None
    ) -> Tensor:
        """[B,C,H,W] as of `Process`, and x_prev: the mean of q(x_{t-1} | x_t, x_0)."""
        if prediction == "x_prev":
            return self.q_posterior_mean_variance(x_start, x_t, t)[0]
        return super().from_x_start(x_start, x_t, t, prediction, eps)

    def x_start_weights(self, prediction: str) -> tuple[Float64s, Float64s]:
        """float64 [T] each: x_start = first · x_t + second · prediction. Infinite for eps at zero SNR."""
        if prediction == "x_prev":
            return -self.posterior_mean_coef2 / self.posterior_mean_coef1, 1 / self.posterior_mean_coef1
        if prediction == "v":  # the general form divides by alpha² + sigma², which is 1 but for rounding
            return self.sqrt_alphas_cumprod.copy(), -self.sqrt_one_minus_alphas_cumprod
        with np.errstate(divide="ignore"):
            return path.x_start_weights(self.level(np.arange(self.timesteps)), prediction)

    # The reverse process

    def p_mean_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: Callable[[Tensor], Tensor] | None = None
    ) -> Reverse:
        """p(x_{t-1} | x_t) from what the network gave: [B,C,H,W], or [B,2C,H,W] with a learned variance.

        clip: applied to x_start before the mean is taken (the paper clips in sampling and in the likelihood).
        """
        value, variance_values = self.split(output, x_t.shape[1])
        x_start = self.to_x_start(value, x_t, t)
        if clip is not None:
            x_start = clip(x_start)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x_t, t)
        log_variance = self.log_variance(variance_values, x_t, t)
        return Reverse(mean, torch.exp(log_variance), log_variance, x_start)

    def log_variance(self, variance_values: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Log-variance of p(x_{t-1} | x_t): [B,C,H,W] if learned, [B,1,1,1] if fixed."""
        if variance_values is None:
            return self.at("fixed_log_variance", t, x_t)
        if self.variance == "learned":
            return variance_values
        low, high = self.at("posterior_log_variance_clipped", t, x_t), self.at("log_betas", t, x_t)
        share = (variance_values + 1) / 2  # Nichol & Dhariwal 2021, equation 15, from outputs in [-1, 1]
        return share * high + (1 - share) * low

    def respaced(self, times: Times) -> "GaussianDiffusion":
        """The process whose S steps are the given times, falling, and whose network gives x_start."""
        alphas_cumprod = self.alphas_cumprod[times[::-1]]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return GaussianDiffusion(betas, "x_start", self.variance)

    def reverse_rows(self, times: Times) -> ReverseRows:
        """Of the respaced process (Nichol & Dhariwal 2021, section 4)."""
        spaced = self.respaced(times)

        def deviation(variance_values: Tensor, x: Tensor, rank: Tensor) -> Tensor:
            return torch.exp(0.5 * spaced.log_variance(variance_values, x, rank))

        return ReverseRows(
            spaced.posterior_mean_coef1[::-1],
            spaced.posterior_mean_coef2[::-1],
            np.exp(0.5 * spaced.fixed_log_variance[::-1]),
            deviation,
        )

    def forward_scales(self, earlier: Level, later: Level) -> tuple[float, float]:
        """The product of the single steps q(x_t | x_{t-1}) in one."""
        ratio = float(np.square(later.alpha) / np.square(earlier.alpha))
        return ratio**0.5, (1 - ratio) ** 0.5
