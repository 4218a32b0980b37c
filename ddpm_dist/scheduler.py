"""The diffusion process <-> diffusers' scheduler_config.json."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.errors import SnapshotError

PREDICTIONS = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}
"""Ours: theirs. x_prev is missing there."""
VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned_range": "learned_range"}
"""Ours: theirs. Their `learned` takes the network's output itself as the variance, so ours is missing there."""

_READ_PREDICTIONS = {theirs: ours for ours, theirs in PREDICTIONS.items()} | {"x_prev": "x_prev"}
_READ_VARIANCES = {theirs: ours for ours, theirs in VARIANCES.items()} | {
    "fixed_small_log": "fixedsmall",  # the same number, computed through the logarithm
    "ddpm_dist_learned": "learned",
}


def portable(diffusion: GaussianDiffusion) -> str | None:
    """None if diffusers can express the process; otherwise what it lacks."""
    if diffusion.prediction not in PREDICTIONS:
        return f"diffusers has no prediction of {diffusion.prediction}"
    if diffusion.variance not in VARIANCES:
        return f"diffusers has no reverse variance like our {diffusion.variance}"
    return None


def to_diffusers(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """scheduler_config.json. Betas that its linear or scaled-linear schedule doesn't give become trained_betas."""
    betas = np.asarray(diffusion.betas, dtype=np.float64)
    start, end, steps = float(betas[0]), float(betas[-1]), len(betas)
    schedule = next((name for name, make in _BETAS.items() if np.array_equal(make(start, end, steps), betas)), None)
    return {
        "_class_name": "DDPMScheduler" if portable(diffusion) is None else "DdpmDistScheduler",
        "beta_end": end if schedule else 0.02,
        "beta_schedule": schedule or "linear",
        "beta_start": start if schedule else 1e-4,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": steps,
        "prediction_type": PREDICTIONS.get(diffusion.prediction, diffusion.prediction),
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None if schedule else betas.tolist(),
        "variance_type": VARIANCES.get(diffusion.variance, f"ddpm_dist_{diffusion.variance}"),
    }


def from_diffusers(config: dict[str, Any], source: str) -> GaussianDiffusion:
    """The process of a scheduler_config.json; SnapshotError names what is missing or unknown in it.

    A missing prediction_type is epsilon: files without one are older than the choice.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _READ_PREDICTIONS:
        raise SnapshotError(f"{source}: prediction_type is {prediction!r}; known are {', '.join(_READ_PREDICTIONS)}")
    variance = _need(config, "variance_type", source)
    if variance not in _READ_VARIANCES:
        raise SnapshotError(f"{source}: variance_type is {variance!r}; known are {', '.join(_READ_VARIANCES)}")
    return GaussianDiffusion(_read_betas(config, source), _READ_PREDICTIONS[prediction], _READ_VARIANCES[variance])


def _read_betas(config: dict[str, Any], source: str) -> np.ndarray:
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    else:
        name = _need(config, "beta_schedule", source)
        make = {**_BETAS, **_MORE_BETAS}.get(name)
        if make is None:
            known = ", ".join((*_BETAS, *_MORE_BETAS))
            raise SnapshotError(f"{source}: beta_schedule is {name!r}; known are {known}, and trained_betas")
        betas = make(*(_need(config, key, source) for key in ("beta_start", "beta_end", "num_train_timesteps")))
    return _rescale_zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _need(config: dict[str, Any], key: str, source: str) -> Any:
    if key not in config:
        raise SnapshotError(f"{source}: no {key}; it isn't guessed: add the value that the weights were trained with")
    return config[key]


def _linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start, end, steps, dtype=np.float64)


def _scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def _squared_cosine(_start: float, _end: float, steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17, betas at most 0.999."""
    alpha_bar = np.cos((np.arange(steps + 1, dtype=np.float64) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _sigmoid(start: float, end: float, steps: int) -> np.ndarray:
    """GeoDiff's, which differs from the sigmoid schedule of Jabri et al."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))


def _rescale_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1: shifts and scales sqrt(alpha_bar) so that it ends at 0 and starts as before."""
    root = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - np.concatenate((alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]))


Schedule = Callable[[float, float, int], np.ndarray]
_BETAS: dict[str, Schedule] = {"linear": _linear, "scaled_linear": _scaled_linear}
"""Schedules that are written by name, (beta_start, beta_end, steps) -> float64 [steps]."""
_MORE_BETAS: dict[str, Schedule] = {"squaredcos_cap_v2": _squared_cosine, "sigmoid": _sigmoid}
"""Schedules that are only read: diffusers computes in float32, so what we trained with is written out."""
