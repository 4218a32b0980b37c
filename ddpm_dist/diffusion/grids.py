"""Which times a sampler visits: any grid on any process."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.diffusion.process import Process, Times
from ddpm_dist.errors import ConfigError

LOWEST_LAMBDA = -5.1
"""Where log_snr's even spacing ends, as DPM-Solver's code does; below it, networks hardly see an image."""

RHO = 7.0  # EDM's exponent


def respace(diffusion: Process, steps: int | None, spacing: str) -> Times:
    """Times that a sampler visits, falling, all different: [steps] int64 in 0..T-1, or float64 of a continuous process.

    uniform: evenly spaced, both ends included (Nichol & Dhariwal 2021, section 4).
    quadratic: evenly spaced square roots, from 0.8 T (Song et al. 2020, appendix D.2), or a continuous one's last time.
    trailing: evenly spaced, counted down from the last time (Lin et al. 2023, section 3.3): flow matching's own.
    log_snr: evenly spaced in log-SNR, from the last time (Lu et al. 2022, appendix): for solvers of higher order.
    rho: evenly spaced 7th roots of sigma / alpha (Karras et al. 2022, equation 5): EDM's own.
    A whole time that would be visited twice gives way to its neighbour. steps: None visits all whole times. Raises
    ConfigError if there are fewer times than steps, and without steps for a continuous process.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"sampling.spacing: {spacing!r} is unknown; choose from {', '.join(SPACINGS)}")
    if not diffusion.discrete:
        return _continuous(diffusion, steps, spacing)
    timesteps = int(diffusion.path.last) + 1
    if steps is None:
        return np.arange(timesteps)[::-1].copy()
    if not 1 <= steps <= timesteps:
        raise ConfigError(
            f"sampling.steps: {steps} can't be taken out of the {timesteps} times of this diffusion process; "
            f"use 1 to {timesteps}"
        )
    if steps == 1:
        return np.array([timesteps - 1])
    rising, rank = SPACINGS[spacing](diffusion, steps), np.arange(steps)
    rising = np.maximum.accumulate(rising.astype(np.int64) - rank) + rank
    return np.minimum(rising, timesteps - steps + rank)[::-1].copy()


def _continuous(diffusion: Process, steps: int | None, spacing: str) -> Times:
    if steps is None or steps < 1:
        raise ConfigError(
            f"sampling.steps: {steps}; this process is continuous, so say how many of its times to visit, such as 18 "
            "with sampling.sampler: heun"
        )
    return np.array([diffusion.path.last]) if steps == 1 else SPACINGS[spacing](diffusion, steps)[::-1].copy()


def _uniform(diffusion: Process, steps: int) -> NDArray[Any]:
    return diffusion.nearest(np.linspace(diffusion.path.first, diffusion.path.last, steps))


def _quadratic(diffusion: Process, steps: int) -> NDArray[Any]:
    path = diffusion.path
    return np.linspace(path.first**0.5, np.sqrt(0.8 * (path.last + 1) if diffusion.discrete else path.last), steps) ** 2


def _trailing(diffusion: Process, steps: int) -> NDArray[Any]:
    shares = np.arange(1, steps + 1)
    if diffusion.discrete:
        return np.round(shares * (int(diffusion.path.last) + 1) / steps) - 1
    return shares * diffusion.path.last / steps


def _log_snr(diffusion: Process, steps: int) -> NDArray[Any]:
    return _at_lambdas(diffusion, np.linspace(*_lambda_ends(diffusion), steps))


def _rho(diffusion: Process, steps: int) -> NDArray[Any]:
    low, high = np.exp(-np.array(_lambda_ends(diffusion)) / RHO)
    return _at_lambdas(diffusion, -RHO * np.log(np.linspace(low, high, steps)))


def _lambda_ends(diffusion: Process) -> tuple[float, float]:
    """lambda = log(alpha / sigma) at the first time, and at the last or where networks hardly see an image."""
    level = diffusion.level(diffusion.nearest(np.array([diffusion.path.first, diffusion.path.last])))
    with np.errstate(divide="ignore"):
        first, last = np.log(level.alpha) - np.log(level.sigma)
    return float(first), max(float(last), LOWEST_LAMBDA)


def _at_lambdas(diffusion: Process, targets: NDArray[np.float64]) -> NDArray[Any]:
    """Times of these lambdas, but for the last, which is the process's own."""
    times = diffusion.times_of(targets)
    times[-1] = diffusion.path.last
    return times


SPACINGS: dict[str, Callable[[Process, int], NDArray[Any]]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "trailing": _trailing,
    "log_snr": _log_snr,
    "rho": _rho,
}
"""Times as [steps] numbers that don't fall, for at least 2 steps."""
