"""Which U-Net: a frozen description in the vocabulary of diffusers' `UNet2DModel`, and its reading and writing."""

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ddpm_dist.config import Below1, ModelConfig, Positive
from ddpm_dist.errors import SnapshotError

DOWN_BLOCKS = {"plain": "DownBlock2D", "attention": "AttnDownBlock2D", "resblock": "ResnetDownsampleBlock2D"}
UP_BLOCKS = {"plain": "UpBlock2D", "attention": "AttnUpBlock2D", "resblock": "ResnetUpsampleBlock2D"}


@dataclass(frozen=True)
class UNetConfig:
    """The network's shape and its arithmetic. Names and meanings are `UNet2DModel`'s; defaults are the paper's.

    `downsample_padding`: 0 pads right and bottom by one pixel (the paper), 1 pads all sides.
    `attention_head_dim`: channels of a head; none: one head.
    `attn_norm_num_groups`: groups of the middle attention's normalisation; none: `norm_num_groups`, or no
    normalisation at all with scale_shift (a quirk of UNet2DModel that its files depend on).
    `attention_heads`: heads at every level, instead of `attention_head_dim`; `timestep_scale`: factor of t before the
    sinusoids. These two UNet2DModel hasn't; they are written where they matter alone.
    `num_class_embeds`: rows of the class embedding, the null class included; none: unconditional.
    """

    sample_size: Positive
    in_channels: Positive
    out_channels: Positive
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: Positive = 2
    attention_head_dim: Positive | None = None
    norm_num_groups: Positive = 32
    attn_norm_num_groups: Positive | None = None
    norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    dropout: Below1 = 0.0
    downsample_padding: int = 0
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: Positive | None = None
    attention_heads: Positive | None = None
    timestep_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @classmethod
    def from_recipe(cls, model: ModelConfig, image_size: int, channels: int, learned_variance: bool) -> "UNetConfig":
        """The network of a recipe. With a learned variance it has 2·channels outputs: [mean part, variance part]."""
        levels = len(model.channel_mult)
        residual = model.resample == "resblock"

        def kind(level: int) -> str:
            if image_size >> level in model.attention_resolutions:
                return "attention"
            return "resblock" if residual else "plain"

        return cls(
            sample_size=image_size,
            in_channels=channels,
            out_channels=2 * channels if learned_variance else channels,
            block_out_channels=tuple(model.channels * mult for mult in model.channel_mult),
            down_block_types=tuple(DOWN_BLOCKS[kind(level)] for level in range(levels)),
            up_block_types=tuple(UP_BLOCKS[kind(level)] for level in reversed(range(levels))),
            layers_per_block=model.num_res_blocks,
            attention_head_dim=model.head_channels,
            norm_num_groups=model.norm_groups,
            attn_norm_num_groups=model.norm_groups if model.scale_shift else None,
            norm_eps=model.norm_eps,
            dropout=model.dropout,
            downsample_padding=model.downsample_padding,
            flip_sin_to_cos=model.sinusoids == "cos_sin",
            freq_shift=model.freq_shift,
            attention_heads=model.heads,
            timestep_scale=model.time_scale,
            downsample_type="resnet" if residual else "conv",
            upsample_type="resnet" if residual else "conv",
            resnet_time_scale_shift="scale_shift" if model.scale_shift else "default",
            num_class_embeds=None if model.num_classes is None else model.num_classes + 1,
        )

    @property
    def levels(self) -> int:
        """Resolutions, the full one included."""
        return len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        """Channels of the time's embedding: four times those of the first level."""
        return 4 * self.block_out_channels[0]

    @property
    def learns_variance(self) -> bool:
        """Whether it has a second half of outputs."""
        return self.out_channels == 2 * self.in_channels

    @property
    def mid_norm_groups(self) -> int | None:
        """Groups of the middle attention's normalisation, or none for no normalisation."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def portable(self) -> str | None:
        """None if UNet2DModel can be this network; otherwise what it lacks."""
        if self.attention_heads is not None:
            return f"UNet2DModel has no number of attention heads ({self.attention_heads} at every level)"
        return None if self.timestep_scale == 1 else f"UNet2DModel has no factor of the time ({self.timestep_scale})"

    def to_diffusers(self) -> dict[str, Any]:
        """`unet/config.json`, with every setting spelled out so that no default of a reader matters."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        own = {name: value for name, value in own.items() if name not in _OURS or value != _OURS[name]}
        name = "UNet2DModel" if self.portable is None else OUR_CLASS
        return {"_class_name": name, **_FIXED, "num_train_timesteps": None, **own}

    @classmethod
    def from_diffusers(cls, config: dict[str, Any], source: str) -> "UNetConfig":
        """Reads `unet/config.json`; raises SnapshotError naming what is missing or what this network can't do."""
        if config.get("_class_name", "UNet2DModel") not in _CLASSES:
            raise SnapshotError(
                f"{source}: _class_name is {config['_class_name']!r}, another network; known is UNet2DModel"
            )
        config = current_keys(config)
        missing = [name for name in _REQUIRED if name not in config]
        if missing:
            raise SnapshotError(
                f"{source}: no {', '.join(missing)}. The weights fit whatever it says, but the network would compute "
                f"something else, so it isn't guessed: add the value that the weights were trained with"
            )
        for name, supported in _FIXED.items():
            value = config.get(name, supported)
            if value != supported and not (name == "act_fn" and value == "swish"):
                raise SnapshotError(f"{source}: {name} is {value!r}; this network knows {supported!r} only")
        if not isinstance(config["sample_size"], int):
            raise SnapshotError(
                f"{source}: sample_size is {config['sample_size']!r}; images are square, give their height in pixels"
            )
        given = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        try:
            found = TypeAdapter(cls).validate_json(json.dumps(given), strict=True).checked()
        except ValidationError as error:
            wrong = error.errors()[0]
            key = ".".join(str(part) for part in wrong["loc"])
            raise SnapshotError(f"{source}: {key} is {wrong['input']!r}: {wrong['msg']}") from None
        except ValueError as error:
            raise SnapshotError(f"{source}: {error}") from None
        if config.get("time_embedding_dim") not in (None, found.time_embed_dim):
            raise SnapshotError(f"{source}: time_embedding_dim is {config['time_embedding_dim']!r}; known is null only")
        return found

    def checked(self) -> "UNetConfig":
        """Itself; ValueError naming the first setting that can't be."""
        if not len(self.block_out_channels) == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"block_out_channels {self.block_out_channels}, down_block_types {self.down_block_types} and "
                f"up_block_types {self.up_block_types} differ in length"
            )
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for value in getattr(self, name):
                if value not in known.values():
                    raise ValueError(f"{name}: {value!r} is not among {', '.join(known.values())}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {', '.join(map(repr, choices))}")
        if self.sample_size % 2 ** (self.levels - 1):
            raise ValueError(f"sample_size is {self.sample_size}, which can't be halved {self.levels - 1} times")
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            raise ValueError(f"block_out_channels: {self.block_out_channels[0]} are too few for the sinusoids of t")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups: {self.norm_num_groups} doesn't divide {channels} channels")
        if self.attention_heads and self.attention_head_dim:
            raise ValueError("attention_heads: exclusive with attention_head_dim")
        for channels in self.attention_channels:
            if self.attention_heads and channels % self.attention_heads:
                raise ValueError(f"attention_heads: {self.attention_heads} doesn't divide {channels} channels")
            if self.attention_head_dim and channels % self.attention_head_dim:
                raise ValueError(f"attention_head_dim: {self.attention_head_dim} doesn't divide {channels} channels")
        return self

    @property
    def attention_channels(self) -> list[int]:
        """Channels of the levels that have attention, on either way, and of the middle."""
        ways = zip(self.block_out_channels, self.down_block_types, reversed(self.up_block_types), strict=True)
        levels = [channels for channels, *kinds in ways if any(kind.startswith("Attn") for kind in kinds)]
        return levels + [self.block_out_channels[-1]] * self.add_attention


_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "positional",
}
"""Settings of UNet2DModel of which this network knows one value."""


def current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A `unet/config.json` of any age with today's names."""
    current = {_FORMER_KEYS.get(name, name): value for name, value in config.items()}
    for name in ("down_block_types", "up_block_types"):
        if isinstance(current.get(name), list):
            current[name] = [_FORMER_BLOCKS.get(str(block), block) for block in current[name]]
    return current


def unknown_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What a `unet/config.json` says that this network hasn't heard of."""
    known = {field.name for field in fields(UNetConfig)} | _FIXED.keys() | {*_INERT}
    known |= {"num_train_timesteps", "time_embedding_dim"}
    current = current_keys(config)
    return {name: current[name] for name in sorted(current) if name not in known and not name.startswith("_")}


OUR_CLASS = "DdpmDistUNet"
"""Written as _class_name of a network that UNet2DModel can't be, so that diffusers refuses it."""

_CLASSES = ("UNet2DModel", "UNetUnconditionalModel", OUR_CLASS)
"""UNetUnconditionalModel is UNet2DModel's first name."""

_OURS: dict[str, Any] = {"attention_heads": None, "timestep_scale": 1.0}

_FORMER_KEYS = {
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}
"""Names of the settings in diffusers' files of before 0.1, and now."""

_FORMER_BLOCKS = {f"UNetRes{name}": name for name in (*DOWN_BLOCKS.values(), *UP_BLOCKS.values())}

_INERT = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
"""What accelerate's `unet_ema/` says of its averaging beside the network."""

_REQUIRED = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
    "layers_per_block", "attention_head_dim", "norm_num_groups", "norm_eps", "downsample_padding",
    "flip_sin_to_cos", "freq_shift", "act_fn", "center_input_sample", "mid_block_scale_factor", "time_embedding_type",
)  # fmt: skip
"""Settings that a file must state. The others are younger than the first hosted files, whose behaviour is our
default, or they show in the weights' names or shapes."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
