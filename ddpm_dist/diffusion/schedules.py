"""Noise schedules: the variances beta_t of the forward process, in float64."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpm_dist.errors import ConfigError

Float64s = NDArray[np.float64]

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def make_betas(
    schedule: str,
    timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    betas: Sequence[float] | None = None,
    zero_terminal_snr: bool = False,
) -> Float64s:
    """Variances beta_t of q(x_t | x_{t-1}): [T] float64 in (0, 1].

    schedule: a key of SCHEDULES, or "given" with `betas`. beta_start, beta_end: ends of the schedules that
    have them (all but cosine and sigmoid_alpha_bar, whose shape is fixed).
    zero_terminal_snr: rescales so that x_T holds no signal; the last beta is then 1.
    Raises ConfigError on an unknown schedule or impossible numbers.
    """
    if timesteps < 1:
        raise ConfigError(f"diffusion.timesteps: {timesteps}; at least 1 is needed")
    if schedule == "given":
        values = np.asarray([] if betas is None else betas, np.float64)
        if len(values) != timesteps:
            raise ConfigError(f"diffusion.betas: {len(values)} values for {timesteps} diffusion.timesteps")
    elif schedule in SCHEDULES:
        if not 0 < beta_start <= beta_end < 1:
            raise ConfigError(
                f"diffusion.beta_start: {beta_start} and diffusion.beta_end: {beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1"
            )
        values = SCHEDULES[schedule](timesteps, beta_start, beta_end)
    else:
        raise ConfigError(f"diffusion.schedule: {schedule!r} is unknown; choose from {', '.join(SCHEDULES)}, given")
    return rescale_zero_terminal_snr(values) if zero_terminal_snr else check_betas(values)


def check_betas(betas: ArrayLike) -> Float64s:
    """`betas` as float64 [T]; raises ConfigError unless all are in (0, 1) (the last may be 1) and alpha_bar lasts."""
    values = np.array(betas, np.float64)
    if values.ndim != 1 or not len(values):
        raise ConfigError(f"diffusion.betas: expected a list of numbers, got an array of shape {values.shape}")
    wrong = ~((values > 0) & (values <= 1) & (1 - values < 1))
    wrong[:-1] |= values[:-1] == 1
    if wrong.any():
        t = int(wrong.argmax())
        tiny = ", and not vanish beside 1 in float64" if 0 < values[t] < 1 else ""
        raise ConfigError(
            f"diffusion.betas: beta[{t}] is {values[t]}; all must lie in (0, 1), the last in (0, 1]{tiny}"
        )
    return _check_signal(values)


def _check_signal(betas: Float64s) -> Float64s:
    """The betas; raises ConfigError if sqrt(alpha_bar) leaves float32's range, but for a last beta of 1."""
    vanished = np.sqrt(np.cumprod(1 - betas)) < np.finfo(np.float32).tiny
    vanished[-1] &= betas[-1] < 1
    if vanished.any():
        raise ConfigError(
            f"diffusion.timesteps: {len(betas)} with these betas are too many: from t = {int(vanished.argmax())} on, "
            "alpha_bar vanishes in float32; make the betas smaller (diffusion.beta_end in proportion to 1 / timesteps) "
            "or the timesteps fewer"
        )
    return betas


def linear(timesteps: int, beta_start: float, beta_end: float) -> Float64s:
    """Ho et al. 2020, section 4."""
    return np.linspace(beta_start, beta_end, timesteps, dtype=np.float64)


def quadratic(timesteps: int, beta_start: float, beta_end: float) -> Float64s:
    """Square roots evenly spaced: "quad" of Ho et al.'s code, "scaled_linear" of latent diffusion."""
    return np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2


def sigmoid(timesteps: int, beta_start: float, beta_end: float) -> Float64s:
    """beta_t is a sigmoid of t (GeoDiff, Xu et al. 2022; diffusers' "sigmoid")."""
    return _logistic(np.linspace(-6, 6, timesteps, dtype=np.float64)) * (beta_end - beta_start) + beta_start


def cosine(timesteps: int, _beta_start: float, _beta_end: float) -> Float64s:
    """Nichol & Dhariwal 2021, equation 17."""

    def alpha_bar(u: Float64s) -> Float64s:
        return np.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2

    return _betas_of(alpha_bar, timesteps)


def sigmoid_alpha_bar(timesteps: int, _beta_start: float, _beta_end: float) -> Float64s:
    """alpha_bar is a sigmoid of t (Jabri et al. 2022, appendix; start -3, end 3, temperature 1)."""
    low, high = _logistic(-3.0), _logistic(3.0)

    def alpha_bar(u: Float64s) -> Float64s:
        return (high - _logistic(6 * u - 3)) / (high - low)

    return _betas_of(alpha_bar, timesteps)


SCHEDULES: dict[str, Callable[[int, float, float], Float64s]] = {
    "linear": linear,
    "scaled_linear": quadratic,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_alpha_bar": sigmoid_alpha_bar,
}


def rescale_zero_terminal_snr(betas: ArrayLike) -> Float64s:
    """Shifts and scales sqrt(alpha_bar) so that it ends at 0 and keeps its start (Lin et al. 2023, algorithm 1)."""
    values = np.asarray(betas, np.float64)
    if len(values) < 2:
        raise ConfigError("diffusion.zero_terminal_snr: needs at least 2 diffusion.timesteps")
    root = np.sqrt(np.cumprod(1 - _check_signal(values)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return check_betas(1 - alphas)


def _betas_of(alpha_bar: Callable[[Float64s], Float64s], timesteps: int) -> Float64s:
    """Betas whose cumulative product follows alpha_bar(u), u in [0, 1], none above MAX_BETA."""
    values = alpha_bar(np.arange(timesteps + 1, dtype=np.float64) / timesteps)
    return np.minimum(1 - values[1:] / values[:-1], MAX_BETA)


def _logistic(u: ArrayLike) -> Float64s:
    return np.asarray(1 / (1 + np.exp(-np.asarray(u, np.float64))))
