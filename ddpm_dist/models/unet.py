"""The paper's U-Net (Ho et al. 2020, appendix B; a PixelCNN++ backbone), and by configuration ADM's variants.

Parameter names follow diffusers' `UNet2DModel`, so its weights load unchanged and ours load there.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_dist import rng
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.arithmetic import Conv2d
from ddpm_dist.models.config import UNetConfig as UNetConfig
from ddpm_dist.models.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)

VANISHING_GAIN = 1e-5
"""Xavier gain of the last layer of each residual branch: the code's variance scale 1e-10."""


class UNet(nn.Module):
    """network(x [B, C, H, W], t [B], labels [B] or None) -> [B, out_channels, H, W] in the parameters' dtype.

    t is the diffusion time, int64 or float, 0-based. labels (int64) are needed with `num_class_embeds`, and
    refused without. Height and width must be multiples of 2^(levels - 1).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config.checked()
        self.checkpoint_levels: frozenset[int] = frozenset()
        channels = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim)
        self.class_embedding = (
            None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, config.time_embed_dim)
        )
        self.down_blocks = nn.ModuleList(_down_level(config, level) for level in range(config.levels))
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(_up_level(config, level) for level in reversed(range(config.levels)))
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] at times t [B], counted from 0, to [B, out_channels, H, W] in the weights' dtype.

        labels: [B] classes; ValueError without them in a conditional network, and with them in another.
        """
        if (labels is None) != (self.class_embedding is None):
            raise ValueError(
                "labels: this network is unconditional" if labels is not None else
                "labels: this network is class-conditional; give a class, or the null class, for each image"
            )  # fmt: skip
        dtype, config = self.conv_in.weight.dtype, self.config
        t = t if config.timestep_scale == 1 else t.float() * config.timestep_scale
        sinusoids = timestep_embedding(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        temb = self.time_embedding(sinusoids.to(dtype))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(labels)
        temb = nn.functional.silu(temb)  # every block begins with it

        h = self.conv_in(x.to(dtype))
        skips = [h]
        for level, down in enumerate(self.down_blocks):
            h, *found = down(h, temb, level in self.checkpoint_levels)
            skips += found
        h = self.mid_block(h, temb, config.levels - 1 in self.checkpoint_levels)
        for level, up in zip(reversed(range(config.levels)), self.up_blocks, strict=True):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            h = up(h, temb, level in self.checkpoint_levels, *taken)
        return self.conv_out(self.conv_norm_out(h))

    def checkpoint(self, levels: Iterable[int]) -> "UNet":
        """Has the activations of these levels recomputed in the backward pass; returns itself.

        Level 0 is the full resolution, the last one includes the middle. What is computed stays the same.
        """
        levels = frozenset(levels)
        beyond = sorted(levels - set(range(self.config.levels)))
        if beyond:
            raise ConfigError(
                f"model.checkpoint_levels: {beyond[0]} is not among the levels 0..{self.config.levels - 1}"
            )
        self.checkpoint_levels = levels
        return self

    def initialize(self, seed: int) -> "UNet":
        """Draws all weights anew from the seed, the paper's code's way; returns itself.

        Xavier uniform, biases 0; the second convolution of a block, the attention's output and the last
        convolution almost vanish, so that every residual branch starts as the identity. The class embedding,
        which the paper hasn't, is standard normal (ADM).
        """
        generator = torch.Generator().manual_seed(rng.fold(seed, rng.Purpose.INIT))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(float(name.endswith("weight")))
                elif name.endswith("bias"):
                    parameter.zero_()
                elif name.startswith("class_embedding"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                else:
                    vanishing = name.endswith(("conv2.weight", "to_out.0.weight")) or name == "conv_out.weight"
                    receptive = math.prod(parameter.shape[2:])
                    fans = (parameter.shape[0] + parameter.shape[1]) * receptive
                    bound = (VANISHING_GAIN if vanishing else 1.0) * math.sqrt(6.0 / fans)
                    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
        return self


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is any."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = None if attentions is None else nn.ModuleList(attentions)

    def block(self, j: int, temb: Tensor, *inputs: Tensor) -> Tensor:
        """Block j with its attention, on the concatenation of the inputs."""
        h = self.resnets[j](torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0], temb)
        return cast(Tensor, h if self.attentions is None else self.attentions[j](h))


def _run(compute: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """compute(*inputs); with `recompute` its activations are computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(compute, *inputs, use_reentrant=False))
    return compute(*inputs)


class _DownLevel(_Level):
    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module] | None, downsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

    def forward(self, h: Tensor, temb: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        """What goes on, then the skips: each block's output, and the downsampled one.

        Tensors that a module returns instead of adding them to a list are seen by ZeRO-3's hooks.
        """
        skips = []
        for j in range(len(self.resnets)):
            h = _run(self.block, j, temb, h, recompute=recompute)
            skips.append(h)
        if self.downsamplers is not None:
            h = _run(self.downsamplers[0], h, temb, recompute=recompute)
            skips.append(h)
        return h, *skips


class _MidBlock(nn.Module):
    """Block → attention → block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))
        self.attentions = (
            nn.ModuleList([_attention(config, channels, config.mid_norm_groups)]) if config.add_attention else None
        )

    def forward(self, h: Tensor, temb: Tensor, recompute: bool) -> Tensor:
        h = _run(self.resnets[0], h, temb, recompute=recompute)
        if self.attentions is not None:
            h = _run(self.attentions[0], h, recompute=recompute)
        return _run(self.resnets[1], h, temb, recompute=recompute)


class _UpLevel(_Level):
    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module] | None, upsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, h: Tensor, temb: Tensor, recompute: bool, *skips: Tensor) -> Tensor:
        """skips: one for each block, in their order, the last that was made first."""
        for j, skip in enumerate(skips):
            h = _run(self.block, j, temb, h, skip, recompute=recompute)
        return h if self.upsamplers is None else _run(self.upsamplers[0], h, temb, recompute=recompute)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, resample: str | None = None) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        config.time_embed_dim,
        config.norm_num_groups,
        config.norm_eps,
        config.dropout,
        config.resnet_time_scale_shift == "scale_shift",
        resample,
    )


def _attention(config: UNetConfig, channels: int, groups: int | None) -> Attention:
    head_channels = channels // (config.attention_heads or 1)
    return Attention(channels, config.attention_head_dim or head_channels, groups, config.norm_eps)


def _down_level(config: UNetConfig, level: int) -> _DownLevel:
    kind, channels = config.down_block_types[level], config.block_out_channels
    inputs, out = channels[max(level - 1, 0)], channels[level]
    resnets = [_resnet(config, inputs if j == 0 else out, out) for j in range(config.layers_per_block)]
    downsampler: nn.Module | None = None
    if level < config.levels - 1:
        residual = kind == "ResnetDownsampleBlock2D" or (kind == "AttnDownBlock2D" and config.downsample_type != "conv")
        downsampler = _resnet(config, out, out, "down") if residual else Downsample(out, config.downsample_padding)
    return _DownLevel(resnets, _attentions(config, kind, out, len(resnets)), downsampler)


def _up_level(config: UNetConfig, level: int) -> _UpLevel:
    """The blocks on the way up take, besides h, the skips of this level: its blocks', and what came into it."""
    kind, channels = config.up_block_types[config.levels - 1 - level], config.block_out_channels
    below, out, above = channels[min(level + 1, config.levels - 1)], channels[level], channels[max(level - 1, 0)]
    last = config.layers_per_block
    resnets = [
        _resnet(config, (below if j == 0 else out) + (above if j == last else out), out) for j in range(last + 1)
    ]
    upsampler: nn.Module | None = None
    if level > 0:
        residual = kind == "ResnetUpsampleBlock2D" or (kind == "AttnUpBlock2D" and config.upsample_type != "conv")
        upsampler = _resnet(config, out, out, "up") if residual else Upsample(out)
    return _UpLevel(resnets, _attentions(config, kind, out, len(resnets)), upsampler)


def _attentions(config: UNetConfig, kind: str, channels: int, count: int) -> list[Attention] | None:
    if not kind.startswith("Attn"):
        return None
    return [_attention(config, channels, config.norm_num_groups) for _ in range(count)]
