"""The diffusion process <-> diffusers' scheduler_config.json."""

from typing import Any

import numpy as np

from ddpm_dist.diffusion import (
    SCHEDULES,
    ContinuousDiffusion,
    GaussianDiffusion,
    Process,
    make_betas,
    rescale_zero_terminal_snr,
)
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.snapshot import levels

PREDICTIONS = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}
"""Ours: theirs. x_prev is missing there."""
VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned_range": "learned_range"}
"""Ours: theirs. Their `learned` takes the network's output itself as the variance, so ours is missing there."""

_READ_PREDICTIONS = {theirs: ours for ours, theirs in PREDICTIONS.items()} | {"x_prev": "x_prev"}
_READ_VARIANCES = {theirs: ours for ours, theirs in VARIANCES.items()} | {
    "fixed_small_log": "fixedsmall",  # the same numbers, computed through the logarithm
    "fixed_large_log": "fixedlarge",
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


TRAINED_VARIANCE = ("DDPMScheduler", "DDPMParallelScheduler", "DdpmDistScheduler")
"""Classes whose steps use a variance of the process, so that their files must say which."""

SAMPLERS = ("DDIM", "DDIMInverse", "DDIMParallel", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
            "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "UniPCMultistep", "DPMSolverMultistep",
            "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "SASolver",
            "RePaint")  # fmt: skip
"""Classes (… Scheduler) that sample the same process in another way, and need no variance of it."""

OTHER_PROCESSES = {
    "flow": "flow matching in another form than EulerDiscrete and HeunDiscrete",
    "edm": "EDM's in another form than Euler and DPMSolverMultistep",
    "cmstochastic": "a consistency model",
    "lcm": "a consistency model",
    "tcd": "a consistency model",
    "consistency": "a consistency model",
    "scoresde": "a score model in continuous time",
    "karrasve": "a score model in continuous time",
    "vqdiffusion": "a diffusion of discrete tokens",
}
"""What names of classes, in small letters, tell of processes that aren't this one."""

PROCESS = ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "predict_epsilon", "prediction_type",
           "rescale_betas_zero_snr", "trained_betas", "variance_type")  # fmt: skip
"""Settings that say what the process is; keys with a leading underscore say nothing of it."""


def not_kept(config: dict[str, Any]) -> list[str]:
    """What a scheduler_config.json says that isn't taken over, in sentences: how to sample belongs to a job here."""
    if levels.is_continuous(config):
        return levels.not_kept(config)
    others = {
        name: value
        for name, value in sorted(config.items())
        if name not in PROCESS and name not in SAMPLING and not name.startswith("_")
    }
    found = [f"its scheduler's {name}: {config[name]}" for name, ours in SAMPLING.items()
             if config.get(name, ours) != ours]  # fmt: skip
    kind = _class_of(config)
    if kind not in TRAINED_VARIANCE:
        listed = ", ".join(f"{name}: {value}" for name, value in others.items())
        return [f"its scheduler is {kind}{f' ({listed})' if listed else ''}", *found]
    return found + [f"its scheduler's {name}: {value}, which is unknown here" for name, value in others.items()]


def _class_of(config: dict[str, Any]) -> str:
    return str(config.get("_class_name", "DDPMScheduler"))


def _check_class(config: dict[str, Any], source: str) -> None:
    """SnapshotError unless the class is one that samples this process."""
    kind = _class_of(config)
    other = next((text for part, text in OTHER_PROCESSES.items() if part in kind.lower()), None)
    if config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type")):
        other = "flow matching"
    if other is not None:
        raise SnapshotError(f"{source}: {kind} is of another process than this program's: {other}")
    if kind not in TRAINED_VARIANCE and kind.removesuffix("Scheduler") not in SAMPLERS:
        known = ", ".join([*TRAINED_VARIANCE, *(f"{name}Scheduler" for name in SAMPLERS)])
        raise SnapshotError(f"{source}: _class_name is {kind!r}, of which process isn't known; known are {known}")


def portable(diffusion: Process) -> str | None:
    """None if diffusers can express the process; otherwise what it lacks."""
    if isinstance(diffusion, ContinuousDiffusion):
        return levels.portable(diffusion)
    if diffusion.prediction not in PREDICTIONS:
        return f"diffusers has no prediction of {diffusion.prediction}"
    if diffusion.variance not in VARIANCES:
        return f"diffusers has no reverse variance like our {diffusion.variance}"
    return None


def pipeline_class(diffusion: Process) -> str:
    """The pipeline of diffusers that samples a portable process as it is meant."""
    return levels.PIPELINES[diffusion.name] if isinstance(diffusion, ContinuousDiffusion) else "DDPMPipeline"


def to_diffusers(diffusion: Process) -> dict[str, Any]:
    """scheduler_config.json. Betas that its linear or scaled-linear schedule doesn't give become trained_betas."""
    if isinstance(diffusion, ContinuousDiffusion):
        return levels.to_diffusers(diffusion)
    assert isinstance(diffusion, GaussianDiffusion)
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


def from_diffusers(config: dict[str, Any], source: str, doubled: bool = False) -> Process:
    """The process of a scheduler_config.json; SnapshotError names what is missing or unknown in it.

    doubled: whether the network gives a variance as well.
    """
    if levels.is_continuous(config):
        return levels.from_diffusers(config, source, doubled)
    _check_class(config, source)
    prediction, variance = _read_prediction(config, source), _read_variance(config, source, doubled)
    try:
        return GaussianDiffusion(_read_betas(config, source), prediction, variance)
    except ConfigError as error:
        raise SnapshotError(f"{source}: {error}") from None


def _read_prediction(config: dict[str, Any], source: str) -> str:
    """prediction_type, or predict_epsilon of diffusers 0.7 and 0.8; files with neither are older than the choice."""
    former = config.get("predict_epsilon")
    if former not in (None, True, False):
        raise SnapshotError(f"{source}: predict_epsilon is {former!r}; it is true or false")
    name = str(config.get("prediction_type", "sample" if former is False else "epsilon"))
    if name not in _READ_PREDICTIONS:
        raise SnapshotError(f"{source}: prediction_type is {name!r}; known are {', '.join(_READ_PREDICTIONS)}")
    if former is not None and former != (name == "epsilon"):
        raise SnapshotError(
            f"{source}: predict_epsilon is {former}, but prediction_type is {name!r}; take out the one that is wrong"
        )
    return _READ_PREDICTIONS[name]


def _read_variance(config: dict[str, Any], source: str, doubled: bool) -> str:
    """variance_type; for a sampler that has none, learned_range or the posterior's (which DDIM's eta = 1 has)."""
    theirs = config.get("variance_type")
    if _class_of(config) not in TRAINED_VARIANCE:
        if not doubled:
            return "fixedsmall"
        if theirs is None:
            raise SnapshotError(
                f"{source}: the network gives a variance, and no variance_type says which; add it, as learned_range"
            )
    variance = str(_need(config, "variance_type", source))
    if variance not in _READ_VARIANCES:
        raise SnapshotError(f"{source}: variance_type is {variance!r}; known are {', '.join(_READ_VARIANCES)}")
    return _READ_VARIANCES[variance]


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
