"""Processes in continuous time <-> diffusers' scheduler_config.json: EDM's and flow matching's own classes."""

from typing import Any

from ddpm_dist.diffusion import ContinuousDiffusion
from ddpm_dist.errors import ConfigError, SnapshotError

CLASSES = {"edm": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
"""What is written, where the network predicts what these classes expect."""
PIPELINES = {"edm": "ConsistencyModelPipeline", "flow": "DDPMPipeline"}
"""Pipelines of a U-Net alone; the first scales noise and inputs as the scheduler says, which EDM's needs."""
EXPECTED = {"edm": "edm", "flow": "velocity"}

_READ = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}
"""Theirs: our process."""
STEPS = 1000
"""What a flow's network is told of t in [0, 1] is t times this."""
VARIANCE = "fixedlarge"
"""Of ancestral sampling, where the file doesn't say it: a key of ours, which diffusers ignores."""

KNOWN = ("_class_name", "num_train_timesteps", "prediction_type", "process", "sigma_data", "sigma_max", "sigma_min",
         "variance_type")  # fmt: skip
SAMPLING = {"final_sigmas_type": "zero", "rho": 7.0, "shift": 1.0, "sigma_schedule": "karras"}
"""Settings of theirs that say how to sample, and what is written for them."""


def is_continuous(config: dict[str, Any]) -> bool:
    """Whether a scheduler_config.json is of such a process."""
    return config.get("_class_name") in _READ or "process" in config


def portable(diffusion: ContinuousDiffusion) -> str | None:
    """None if diffusers can express the process; otherwise what it lacks."""
    if diffusion.prediction == EXPECTED[diffusion.name]:
        return None
    return f"diffusers has no prediction of {diffusion.prediction} for process {diffusion.name}"


def to_diffusers(diffusion: ContinuousDiffusion) -> dict[str, Any]:
    """scheduler_config.json."""
    edm = diffusion.name == "edm"
    numbers = {name: getattr(diffusion, name) for name in ("sigma_data", *(("sigma_max", "sigma_min") if edm else ()))}
    variance = {} if diffusion.variance == VARIANCE else {"variance_type": diffusion.variance}
    if portable(diffusion) is not None:
        ours = {"process": diffusion.name, "prediction_type": diffusion.prediction, **numbers}
        return {"_class_name": "DdpmDistScheduler", **ours, **variance}
    common = {"_class_name": CLASSES[diffusion.name], "num_train_timesteps": STEPS, **variance}
    if not edm:
        return {**common, "shift": SAMPLING["shift"]}
    sampling = {name: SAMPLING[name] for name in ("final_sigmas_type", "rho", "sigma_schedule")}
    return {**common, **numbers, **sampling, "prediction_type": "epsilon"}


def from_diffusers(config: dict[str, Any], source: str, doubled: bool) -> ContinuousDiffusion:
    """The process of a scheduler_config.json; SnapshotError names what is missing or unknown in it."""
    kind = str(config.get("_class_name"))
    name = _READ.get(kind, str(config.get("process")))
    if doubled:
        raise SnapshotError(f"{source}: {kind} has no variance, which the network gives")
    if name == "flow" and config.get("num_train_timesteps", STEPS) != STEPS:
        raise SnapshotError(
            f"{source}: num_train_timesteps is {config['num_train_timesteps']!r}; the network is told {STEPS} t here"
        )
    theirs = config.get("prediction_type", "epsilon")
    if kind in _READ and name == "edm" and theirs != "epsilon":
        raise SnapshotError(f"{source}: prediction_type is {theirs!r}; of {kind} only epsilon, EDM's F, is known here")
    prediction = EXPECTED[name] if kind in _READ else str(theirs)
    numbers = {key: config[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in config}
    for key, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise SnapshotError(f"{source}: {key} is {value!r}; a number is needed")
    try:
        return ContinuousDiffusion(name, prediction, str(config.get("variance_type", VARIANCE)), **numbers)
    except ConfigError as error:
        raise SnapshotError(f"{source}: {error}") from None


def not_kept(config: dict[str, Any]) -> list[str]:
    """What a file says that isn't taken over, in sentences."""
    return [
        f"its scheduler's {name}: {value}"
        for name, value in sorted(config.items())
        if name not in KNOWN and not name.startswith("_") and SAMPLING.get(name) != value
    ]
