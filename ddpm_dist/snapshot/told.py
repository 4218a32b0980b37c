"""What the user says of foreign weights, held against what they say themselves; and what neither says is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError
from ddpm_dist.recipe import apply_override, parse_yaml, read_recipe, validate
from ddpm_dist.storage import redact

MEANINGS = {
    "data.image_size": "height of its images in pixels",
    "diffusion.timesteps": "T, such as 1000",
    "diffusion.schedule": "linear, cosine, …",
    "diffusion.prediction": "eps, x_start or v",
    "diffusion.variance": "fixedsmall, fixedlarge or learned_range",
    "model.head_channels": "channels of an attention head, null for one head; or model.heads",
    "model.time_scale": "1000 / T if it was trained with rescale_timesteps, else 1",
    "model.norm_eps": "1e-6 or 1e-5",
    "model.norm_groups": "of the normalisations, usually 32",
    "model.downsample_padding": "0 or 1",
    "model.sinusoids": "sin_cos or cos_sin",
    "model.freq_shift": "1 or 0",
    "--qkv": "apart if it was trained with use_new_attention_order, else together",
}
"""Keys of a recipe, and an option, that are asked for where a file doesn't tell them."""


@dataclass(frozen=True)
class Told:
    """The recipe's path or name, overrides, which weights are meant, and the order of q, k and v."""

    recipe: str | None = None
    overrides: Sequence[str] = ()
    weights: str | None = None
    """ema, raw, or none."""
    qkv: str | None = None
    """together, apart, or none."""

    def config_of(self, facts: Mapping[str, Any], asks: Sequence[str], fused: bool, url: str) -> Config:
        """A recipe of what was said and of the facts, which are keys of a recipe and `levels` with attention.

        asks: keys that must be known. fused: whether the file has q, k and v in one, so that heads must be known.
        Raises ConfigError with all that is missing, or with what was said otherwise than it is.
        """
        values = self._values(url)
        self._ask(values, facts, [*asks, *_asked_for_heads(values, fused)], redact(url))
        facts = _with_resolutions(facts, values["data"].get("image_size"))
        _hold_against(values, facts, redact(url))
        for key, fact in facts.items():
            section, _, name = key.partition(".")
            values[section][name] = fact
        # A conversion has no use for the loss, but the check wants one that fits the variance.
        values["diffusion"]["loss"] = "vlb"
        values["diffusion"].pop("weighting", None)
        return validate(values, f"what is known of {redact(url)}")

    def _values(self, url: str) -> dict[str, Any]:
        """The recipe's plain values with the overrides; what a conversion has no use for is made up."""
        source = f"--config {self.recipe}"
        values = {} if self.recipe is None else parse_yaml(read_recipe(self.recipe), source)
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected sections such as `model:`, found {values!r}")
        for override in self.overrides:
            apply_override(values, override)
        values = {section: values.get(section) or {} for section in ("run", "data", "model", "diffusion")}
        wrong = [name for name, section in values.items() if not isinstance(section, dict)]
        if wrong:
            raise ConfigError(f"{source}: {wrong[0]} is a value, not a section")
        for section in ("run", "data"):
            values[section] = {**values[section], "url": f"{url}-{section}"}
        return {**values, "train": {"steps": 1, "global_batch": 1}}

    def _ask(self, values: Mapping[str, Any], facts: Mapping[str, Any], asks: Sequence[str], place: str) -> None:
        known = {f"{section}.{name}" for section, keys in values.items() for name in keys} | facts.keys()
        known |= {"--qkv"} if self.qkv else set()
        known |= {"model.head_channels"} if "model.heads" in known else set()
        missing = [key for key in dict.fromkeys(asks) if key not in known]
        if missing:
            raise ConfigError(
                f"{place}: the file doesn't tell all that its weights compute. Say it by --config RECIPE, or as "
                "KEY=VALUE:\n  " + "\n  ".join(f"{key}: {MEANINGS[key]}" for key in missing)
            )


def _asked_for_heads(values: Mapping[str, Any], fused: bool) -> list[str]:
    """What OpenAI's flags say and its files don't; where there is one head, the order of q, k and v is one."""
    if not fused:
        return []
    model, steps = values["model"], values["diffusion"].get("timesteps", 1000)
    one_head = model.get("heads") == 1 or ("head_channels" in model and model["head_channels"] is None)
    asks = ["model.head_channels", *([] if one_head and not model.get("heads", 1) > 1 else ["--qkv"])]
    return asks + (["model.time_scale"] if steps != 1000 else [])


def _with_resolutions(facts: Mapping[str, Any], size: Any) -> dict[str, Any]:
    """The facts with model.attention_resolutions for `levels`."""
    known = {key: value for key, value in facts.items() if key != "levels"}
    size = known.get("data.image_size", size)
    if "levels" in facts and isinstance(size, int):
        known["model.attention_resolutions"] = [size >> level for level in facts["levels"]]
    return known


def _hold_against(values: Mapping[str, Any], facts: Mapping[str, Any], place: str) -> None:
    wrong = []
    for key, fact in facts.items():
        section, _, name = key.partition(".")
        said = values[section].get(name, fact)
        ordered = name == "attention_resolutions" and isinstance(said, list)
        if (sorted(said) != sorted(fact)) if ordered else said != fact:
            wrong.append(f"{key}: {fact} there, {said} was said")
    if wrong:
        raise ConfigError(f"{place}: is of another network than was said:\n  " + "\n  ".join(wrong))
