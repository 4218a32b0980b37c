"""`model:`, the network."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Below1, Count, Free, Positive, Section


class ModelConfig(Section):
    """The U-Net's shape, and how it is computed."""

    channels: Annotated[int, Field(ge=4)] = 128
    """Channels of the first level (ch)."""
    channel_mult: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 2, 2)
    num_res_blocks: Positive = 2
    attention_resolutions: tuple[Positive, ...] = (16,)
    """Heights of the feature maps that get self-attention after every block."""
    dropout: Below1 = 0.0
    head_channels: Positive | None = None
    """Channels of an attention head; none: one head (the paper)."""
    heads: Positive | None = None
    """Attention heads at every level, instead of head_channels (OpenAI's improved-diffusion)."""
    norm_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    scale_shift: bool = False
    """The time embedding scales and shifts the second normalisation (ADM), instead of being added."""
    resample: Literal["conv", "resblock"] = "conv"
    """Strided convolution (the paper) or residual blocks (ADM, BigGAN) between the levels."""
    downsample_padding: Literal[0, 1] = 0
    """Of the strided convolutions: 0 pads right and bottom (the paper), 1 all sides (diffusers' script, ADM)."""
    sinusoids: Literal["sin_cos", "cos_sin"] = "sin_cos"
    """Order in the time embedding: sines first (the paper) or cosines first (diffusers' script, ADM)."""
    freq_shift: Literal[0, 1] = 1
    """Its frequencies are 10000^(-i / (half - freq_shift)): 1 is the paper's, 0 that of diffusers' script and ADM."""
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor of t before the sinusoids: 1000 / T for OpenAI's rescale_timesteps, else 1."""
    num_classes: Positive | None = None
    """Classes of a conditional network; the null class of guidance is an extra last row."""
    checkpoint_levels: Free[tuple[Count, ...]] = ()
    """Levels whose activations are recomputed in the backward pass (0 is the full resolution)."""
    channels_last: Free[bool] = False
    """Memory layout of the activations: for GPUs with tensor cores; on CPUs it is slower (NOTES.md, "The network")."""
    compile: Free[bool] = False
    """torch.compile of the network in training, for GPUs: it costs the first step minutes, and on CPUs the others, too
    (NOTES.md, "Compiling")."""


def check_model(model: ModelConfig, size: int) -> None:
    """Levels, groups and heads that fit images of size × size pixels; else ValueError."""
    if model.heads and model.head_channels:
        raise ValueError("model.heads: give it or model.head_channels, not both")
    halvings = len(model.channel_mult) - 1
    if size % 2**halvings:
        raise ValueError(
            f"data.image_size: {size} can't be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.channel_mult want; use a multiple of {2**halvings} or fewer levels"
        )
    for level, mult in enumerate(model.channel_mult):
        if model.channels * mult % model.norm_groups:
            raise ValueError(
                f"model.norm_groups: {model.norm_groups} doesn't divide the {model.channels * mult} channels "
                f"of level {level}"
            )
        attends = level == halvings or size >> level in model.attention_resolutions
        if model.heads and attends and model.channels * mult % model.heads:
            raise ValueError(
                f"model.heads: {model.heads} doesn't divide the {model.channels * mult} channels of level {level}"
            )
        if model.head_channels and attends and model.channels * mult % model.head_channels:
            raise ValueError(
                f"model.head_channels: {model.head_channels} doesn't divide the {model.channels * mult} "
                f"channels of level {level}"
            )
    for level in model.checkpoint_levels:
        if level > halvings:
            raise ValueError(f"model.checkpoint_levels: {level}: the network has the levels 0 to {halvings}")
    resolutions = [size >> level for level in range(halvings + 1)]
    for resolution in model.attention_resolutions:
        if resolution not in resolutions:
            raise ValueError(
                f"model.attention_resolutions: {resolution} is not among the resolutions {resolutions} of the levels"
            )
