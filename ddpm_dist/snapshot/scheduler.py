"""The diffusion process <-> diffusers' scheduler_config.json."""

from typing import Any

import numpy as np

from ddpm_dist.diffusion import SCHEDULES, GaussianDiffusion, make_betas, rescale_zero_terminal_snr
from ddpm_dist.errors import ConfigError, SnapshotError

PREDICTIONS = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}
"""Ours: theirs. x_prev is missing there."""
VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned_range": "learned_range"}
"""Ours: theirs. Their `learned` takes the network's output itself as the variance, so ours is missing there."""

_READ_PREDICTIONS = {theirs: ours for ours, theirs in PREDICTIONS.items()} | {"x_prev": "x_prev"}
_READ_VARIANCES = {theirs: ours for ours, theirs in VARIANCES.items()} | {
    "fixed_small_log": "fixedsmall",  # the same number, computed through the logarithm
    "ddpm_dist_learned": "learned",
}
_READ_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
"""Theirs: ours. Only the first two are written by name; the others' small betas suffer in diffusers' float32."""


SAMPLING = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
}
"""Settings of theirs that say how to sample, and what is written for them: here they belong to a job (`sampling`)."""


def not_kept(config: dict[str, Any]) -> dict[str, Any]:
    """Those of SAMPLING that a scheduler_config.json has otherwise than we write them."""
    return {name: config[name] for name, ours in SAMPLING.items() if config.get(name, ours) != ours}


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
    named = ("linear", "scaled_linear") if 0 < start <= end < 1 else ()
    schedule = next((name for name in named if np.array_equal(SCHEDULES[name](steps, start, end), betas)), None)
    return {
        "_class_name": "DDPMScheduler" if portable(diffusion) is None else "DdpmDistScheduler",
        "beta_end": end if schedule else 0.02,
        "beta_schedule": schedule or "linear",
        "beta_start": start if schedule else 1e-4,
        **SAMPLING,
        "num_train_timesteps": steps,
        "prediction_type": PREDICTIONS.get(diffusion.prediction, diffusion.prediction),
        "rescale_betas_zero_snr": False,
        "trained_betas": None if schedule else betas.tolist(),
        "variance_type": VARIANCES.get(diffusion.variance, f"ddpm_dist_{diffusion.variance}"),
    }


def from_diffusers(config: dict[str, Any], source: str) -> GaussianDiffusion:
    """The process of a scheduler_config.json; SnapshotError names what is missing or unknown in it.

    A missing prediction_type is epsilon: files without one are older than the choice.
    """
    prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in _READ_PREDICTIONS:
        raise SnapshotError(f"{source}: prediction_type is {prediction!r}; known are {', '.join(_READ_PREDICTIONS)}")
    variance = str(_need(config, "variance_type", source))
    if variance not in _READ_VARIANCES:
        raise SnapshotError(f"{source}: variance_type is {variance!r}; known are {', '.join(_READ_VARIANCES)}")
    try:
        betas = _read_betas(config, source)
        return GaussianDiffusion(betas, _READ_PREDICTIONS[prediction], _READ_VARIANCES[variance])
    except ConfigError as error:
        raise SnapshotError(f"{source}: {error}") from None


def _read_betas(config: dict[str, Any], source: str) -> np.ndarray:
    if config.get("trained_betas") is not None:
        try:
            betas = np.asarray(config["trained_betas"], dtype=np.float64)
        except (TypeError, ValueError):
            raise SnapshotError(f"{source}: trained_betas are not a list of numbers") from None
    else:
        name = _need(config, "beta_schedule", source)
        if str(name) not in _READ_SCHEDULES:
            known = ", ".join(_READ_SCHEDULES)
            raise SnapshotError(f"{source}: beta_schedule is {name!r}; known are {known}, and trained_betas")
        steps, start, end = (_need(config, key, source) for key in ("num_train_timesteps", "beta_start", "beta_end"))
        for key, value, kind in (
            ("num_train_timesteps", steps, int),
            ("beta_start", start, float),
            ("beta_end", end, float),
        ):
            if not isinstance(value, (int, kind)) or isinstance(value, bool):
                raise SnapshotError(f"{source}: {key} is {value!r}; a number is needed")
        betas = make_betas(_READ_SCHEDULES[name], steps, start, end)
    return rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _need(config: dict[str, Any], key: str, source: str) -> Any:
    if key not in config:
        raise SnapshotError(f"{source}: no {key}; it isn't guessed: add the value that the weights were trained with")
    return config[key]
