"""A network and a process as the keys of a recipe: what a recipe leaves open is taken from them, what it says otherwise
is refused.

Weights fit by their shapes and compute something else, so shapes decide nothing here: every key is compared.
"""

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from ddpm_dist.config import Config, ModelConfig
from ddpm_dist.diffusion import (
    SCHEDULES,
    ContinuousDiffusion,
    GaussianDiffusion,
    Process,
    make_betas,
    rescale_zero_terminal_snr,
)
from ddpm_dist.errors import ConfigError
from ddpm_dist.models import UNetConfig
from ddpm_dist.recipe import apply_override, validate

log = logging.getLogger(__name__)

LEARNED = ("learned", "learned_range")
"""Variances for which the network has as many further outputs as the image has channels."""

SCHEDULE_KEYS = tuple(f"diffusion.{name}" for name in
                      ("schedule", "timesteps", "beta_start", "beta_end", "betas", "zero_terminal_snr"))  # fmt: skip
"""They describe one thing, the betas, and are compared and taken as one."""

SIGMAS = ("sigma_min", "sigma_max")

HEAD_KEYS = ("model.head_channels", "model.heads")


def network_of(cfg: Config) -> UNetConfig:
    """The network that a recipe describes."""
    learned = cfg.diffusion.variance in LEARNED
    return UNetConfig.from_recipe(cfg.model, cfg.data.image_size, cfg.data.channels, learned)


def keys_of_network(network: UNetConfig, image_size: int) -> dict[str, Any]:
    """`data.channels` and `model.*` of a network as a recipe for images of this size would have them.

    Without model.num_classes, as a config doesn't say whether its last class is the null class, and without
    model.dropout, which is no property of weights.
    """
    attention = [level for level, kind in enumerate(network.down_block_types) if kind.startswith("Attn")]
    first = network.block_out_channels[0]
    return {
        "data.channels": network.in_channels,
        "model.channels": first,
        "model.channel_mult": [channels // first for channels in network.block_out_channels],
        "model.num_res_blocks": network.layers_per_block,
        "model.attention_resolutions": [image_size >> level for level in attention],
        "model.head_channels": network.attention_head_dim,
        "model.heads": network.attention_heads,
        "model.norm_groups": network.norm_num_groups,
        "model.norm_eps": network.norm_eps,
        "model.scale_shift": network.resnet_time_scale_shift == "scale_shift",
        "model.resample": "resblock" if _has_residual_resampling(network) else "conv",
        "model.downsample_padding": network.downsample_padding,
        "model.sinusoids": "cos_sin" if network.flip_sin_to_cos else "sin_cos",
        "model.freq_shift": network.freq_shift,
        "model.time_scale": network.timestep_scale,
    }


def _has_residual_resampling(network: UNetConfig) -> bool:
    between = network.down_block_types[:-1]
    residual = any(kind.startswith("Resnet") for kind in between)
    return residual or (network.downsample_type == "resnet" and any(kind.startswith("Attn") for kind in between))


def keys_of_process(diffusion: Process) -> dict[str, Any]:
    """`diffusion.*` that make the same process: its schedule by name where it has one, else its betas."""
    if isinstance(diffusion, ContinuousDiffusion):
        names = ("prediction", "variance", "sigma_data", *(SIGMAS if diffusion.name == "edm" else ()))
        told = {f"diffusion.{name}": getattr(diffusion, name) for name in names}
        return {"diffusion.process": diffusion.name, **told}
    assert isinstance(diffusion, GaussianDiffusion)
    betas, steps = diffusion.betas, diffusion.timesteps
    keys: dict[str, Any] = {
        "diffusion.process": "ddpm",
        "diffusion.prediction": diffusion.prediction,
        "diffusion.variance": diffusion.variance,
        "diffusion.timesteps": steps,
        "diffusion.zero_terminal_snr": False,
        "diffusion.betas": None,
    }
    start, end = float(betas[0]), float(betas[-1])
    for name in SCHEDULES:
        # cosine and its like have no ends, so the defaults describe them as well.
        for low, high in ((start, end), (1e-4, 2e-2)):
            if not 0 < low <= high < 1:
                continue
            found = SCHEDULES[name](steps, low, high)
            ends = {"diffusion.beta_start": low, "diffusion.beta_end": high}
            if np.array_equal(found, betas):
                return {**keys, **ends, "diffusion.schedule": name}
            if diffusion.zero_terminal_snr and np.array_equal(rescale_zero_terminal_snr(found), betas):
                return {**keys, **ends, "diffusion.schedule": name, "diffusion.zero_terminal_snr": True}
    ends = {"diffusion.beta_start": 1e-4, "diffusion.beta_end": 2e-2}
    return {**keys, **ends, "diffusion.schedule": "given", "diffusion.betas": betas.tolist()}


def reconcile(
    cfg: Config, told: Mapping[str, Any], place: str, meant: Collection[str] = (), why: str = "run.init_from"
) -> Config:
    """The recipe with the keys that it leaves open as they are `told`; says which, and what differs on purpose.

    meant: keys that may differ. Raises ConfigError with all others that do, with both values.
    """
    values = cfg.model_dump(mode="json")
    refused: list[str] = []
    if _value(cfg, "diffusion.process") != told.get("diffusion.process", "ddpm"):
        told = _of_another_process(cfg, told, values["diffusion"])
    for keys in _grouped(told):
        apart = [key for key in keys if not _equal(key, _value(cfg, key), told[key])]
        if keys == SCHEDULE_KEYS and np.array_equal(_betas(told), GaussianDiffusion.from_config(cfg.diffusion).betas):
            apart = []
        if apart and not any(_is_stated(cfg, key) for key in keys):
            for key in keys:
                section, _, name = key.partition(".")
                values[section][name] = told[key]
            log.info("%s: as %s has it: %s", why, place, ", ".join(f"{key}: {_show(told[key])}" for key in apart))
            continue
        for key in apart:
            text = f"{key}: {_show(told[key])} there, {_show(_value(cfg, key))} here"
            if not set(keys).isdisjoint(meant):
                log.warning("%s: changed, as run.init_changes says: %s", why, text)
            elif key == "diffusion.variance" and _may_change(told[key], _value(cfg, key)):
                log.info("%s: another variance: %s", why, text)
            else:
                refused.append(text)
    if refused:
        remedy = ", or name in run.init_changes those that are meant to differ" if why == "run.init_from" else ""
        raise ConfigError(
            f"{why}: {place} is of another network or process than the recipe describes, so its weights would compute "
            "something else:\n  "
            + "\n  ".join(refused)
            + f"\nLeave these keys out of the recipe to take them from there{remedy}."
        )
    return validate(values, f"the recipe with what {place} says")


def _of_another_process(cfg: Config, told: Mapping[str, Any], values: dict[str, Any]) -> Mapping[str, Any]:
    """What is told, as far as it can be compared; of `values` goes what follows from the process, if it is open."""
    if not _is_stated(cfg, "diffusion.process"):
        if not _is_stated(cfg, "diffusion.times"):
            del values["times"]
        return told
    own = {*SCHEDULE_KEYS, "diffusion.sigma_data", *(f"diffusion.{name}" for name in SIGMAS)}
    return {key: value for key, value in told.items() if key not in own}


def check_describable(network: UNetConfig, place: str) -> None:
    """ConfigError naming what no recipe says of a network, so that it can be sampled from, but not trained on."""
    keys = keys_of_network(network, network.sample_size)
    try:
        model = ModelConfig.model_validate_json(json.dumps({k.partition(".")[2]: v for k, v in keys.items()
                                                            if k.startswith("model.")}))  # fmt: skip
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"run.init_from: {place}: no recipe describes its network: model.{wrong['loc'][0]}: {wrong['input']!r}"
        ) from None
    ours = UNetConfig.from_recipe(model, network.sample_size, network.in_channels, network.learns_variance)
    names = ("block_out_channels", "down_block_types", "up_block_types", "add_attention", "mid_norm_groups",
             "downsample_type", "upsample_type", "resnet_time_scale_shift", "out_channels")  # fmt: skip
    apart = [
        f"{name}: {getattr(network, name)} there, {getattr(ours, name)} by a recipe"
        for name in names
        if getattr(network, name) != getattr(ours, name)
    ]
    if apart:
        raise ConfigError(
            f"run.init_from: {place}: no recipe describes its network; it can be sampled from, not trained on:\n  "
            + "\n  ".join(apart)
        )


def open_keys_of(cfg: Config, saved: Config) -> Config:
    """The recipe with what it leaves open in data.channels, model and diffusion as a saved one has it."""
    values = cfg.model_dump(mode="json")
    before = saved.model_dump(mode="json")
    for section in ("model", "diffusion"):
        for name, value in before[section].items():
            if not _is_stated(cfg, f"{section}.{name}"):
                values[section][name] = value
    if not _is_stated(cfg, "data.channels"):
        apply_override(values, f"data.channels={before['data']['channels']}")
    return validate(values, "the recipe with what the run's config.yaml says")


def _grouped(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    groups = [group for group in (SCHEDULE_KEYS, HEAD_KEYS) if all(key in told for key in group)]
    grouped = {key for group in groups for key in group}
    return groups + [(key,) for key in told if key not in grouped]


def _value(cfg: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


def _is_stated(cfg: Config, key: str) -> bool:
    """Whether the recipe's own text has the key, and not its default alone."""
    section, _, name = key.partition(".")
    return name in getattr(cfg, section).model_fields_set


def _equal(key: str, ours: Any, theirs: Any) -> bool:
    if key == "model.attention_resolutions":
        return {*ours} == {*theirs}
    return bool((list(ours) if isinstance(ours, tuple) else ours) == theirs)


def _may_change(theirs: str, ours: str) -> bool:
    """Of variances: a fixed one is a matter of sampling; for learned_range, `fit` makes the rows or leaves them."""
    return ours != "learned" and theirs != "learned"


def _betas(told: Mapping[str, Any]) -> np.ndarray:
    return make_betas(*(told[f"diffusion.{name}"] for name in
                        ("schedule", "timesteps", "beta_start", "beta_end", "betas", "zero_terminal_snr")))  # fmt: skip


def _show(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) < 60 else f"{text[:50]}… ({len(value)} values)"
