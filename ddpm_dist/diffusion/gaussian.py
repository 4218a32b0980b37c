"""The forward process q and the reverse process p of a Gaussian diffusion (Ho, Jain & Abbeel 2020).

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


class GaussianDiffusion:
    """Both processes over T steps; holds constants alone, so it can be shared and pickled.

    betas: [T] in (0, 1], any sequence. prediction: what the network's first C channels mean, one of PREDICTIONS.
    variance: of the reverse process, one of VARIANCES; the learned ones read C further channels.
    Raises ConfigError on unknown names, impossible betas, and eps with a last beta of 1 (x_T = eps holds nothing
    of x_start, so it can't be found from eps).

    float64 [T] arrays: betas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod,
    sqrt_one_minus_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
    posterior_mean_coef2, fixed_log_variance (of fixedlarge or fixedsmall), log_betas, snr.
    """

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
        for name in PREDICTIONS:
            of_x_t, of_prediction = self.x_start_weights(name)
            setattr(self, f"_weight_of_x_t_given_{name}", of_x_t)
            setattr(self, f"_weight_of_{name}", of_prediction)

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

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives 2C channels."""
        return self.variance in ("learned", "learned_range")

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

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) from standard normal eps, equation 4: [B,C,H,W]."""
        signal, noise = (self.at(f"sqrt_{n}alphas_cumprod", t, x_start) for n in ("", "one_minus_"))
        return signal * x_start + noise * eps

    def q_step(self, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_{t-1}), equation 2, all [B, C, H, W], t [B]; x_{-1} is the image."""
        beta = self.at("betas", t, x_prev)
        return torch.sqrt(1 - beta) * x_prev + torch.sqrt(beta) * eps

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B,C,H,W], variance and clipped log-variance [B,1,1,1] of q(x_{t-1} | x_t, x_0), equations 6 and 7."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self.at("posterior_variance", t, x_t), self.at("posterior_log_variance_clipped", t, x_t)

    # What the network predicts

    def target(self, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """[B, C, H, W]: what the network is trained to give for x_t = q_sample(x_start, t, eps), by this prediction."""
        if self.prediction == "eps":
            return eps
        return x_start if self.prediction == "x_start" else self.from_x_start(x_start, x_t, t, self.prediction, eps)

    def to_x_start(self, value: Tensor, x_t: Tensor, t: Tensor, prediction: str | None = None) -> Tensor:
        """x_start from a prediction (default: this process's own) at x_t: [B,C,H,W]. Inverse of `from_x_start`."""
        name = prediction or self.prediction
        return self.at(f"_weight_of_x_t_given_{name}", t, x_t) * x_t + self.at(f"_weight_of_{name}", t, x_t) * value

    def from_x_start(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: str, eps: Tensor | None = None
    ) -> Tensor:
        """The prediction that means `x_start` at x_t: [B,C,H,W].

        eps: the noise, where it is known; else (x_t - sqrt(alpha_bar) x_start) / sqrt(1 - alpha_bar), which loses
        some bits at small t.
        """
        if prediction == "x_start":
            return x_start
        if prediction == "x_prev":
            return self.q_posterior_mean_variance(x_start, x_t, t)[0]
        signal, noise = self.at("sqrt_alphas_cumprod", t, x_t), self.at("sqrt_one_minus_alphas_cumprod", t, x_t)
        if eps is None:
            eps = (x_t - signal * x_start) / noise
        return eps if prediction == "eps" else signal * eps - noise * x_start

    def x_start_weights(self, prediction: str) -> tuple[Float64s, Float64s]:
        """float64 [T] each: x_start = first · x_t + second · prediction. Infinite for eps at zero SNR."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if prediction == "eps":
            with np.errstate(divide="ignore"):
                return 1 / signal, -noise / signal
        if prediction == "v":  # Salimans & Ho 2022, appendix D
            return signal.copy(), -noise
        if prediction == "x_prev":
            return -self.posterior_mean_coef2 / self.posterior_mean_coef1, 1 / self.posterior_mean_coef1
        return np.zeros_like(signal), np.ones_like(signal)

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

    def log_variance(self, variance_values: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Log-variance of p(x_{t-1} | x_t): [B,C,H,W] if learned, [B,1,1,1] if fixed."""
        if variance_values is None:
            return self.at("fixed_log_variance", t, x_t)
        if self.variance == "learned":
            return variance_values
        low, high = self.at("posterior_log_variance_clipped", t, x_t), self.at("log_betas", t, x_t)
        share = (variance_values + 1) / 2  # Nichol & Dhariwal 2021, equation 15, from outputs in [-1, 1]
        return share * high + (1 - share) * low
