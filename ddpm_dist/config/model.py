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
    norm_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    scale_shift: bool = False
    """The time embedding scales and shifts the second normalisation (ADM), instead of being added."""
    resample: Literal["conv", "resblock"] = "conv"
    """Strided convolution (the paper) or residual blocks (ADM, BigGAN) between the levels."""
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
