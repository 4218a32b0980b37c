"""The parts of the U-Net. Activations are [B, C, H, W] in the parameters' dtype; temb is [B, 4·ch], behind its SiLU.

Parameters are named as in diffusers, and each is used inside the forward of the module that owns it, which is
what ZeRO-3 asks for: it gathers a module's parameters when its forward begins.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.models.arithmetic import Conv2d, Linear, UpsamplingConv2d, attention
from ddpm_dist.models.norms import GroupNorm, GroupNormSiLU as GroupNormSiLU


def timestep_embedding(t: Tensor, channels: int, flip_sin_to_cos: bool = False, freq_shift: int = 1) -> Tensor:
    """Sinusoids of the diffusion time, [B] -> [B, channels] float32: [sin, cos] at 10000^(-i/(half - freq_shift)).

    The paper's code has freq_shift 1 and sine first; ADM's has freq_shift 0 and cosine first.
    """
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t.float()[:, None] * torch.exp(exponent)
    pair = (torch.cos(angle), torch.sin(angle)) if flip_sin_to_cos else (torch.sin(angle), torch.cos(angle))
    return F.pad(torch.cat(pair, dim=1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """Linear → SiLU → Linear."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = Linear(channels, out_channels)
        self.linear_2 = Linear(out_channels, out_channels)

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding [B, C] to [B, time_embed_dim]."""
        return self.linear_2(F.silu(self.linear_1(embedding)))


class Downsample(nn.Module):
    """Strided 3×3 convolution. Padding 0 means right and bottom only: TensorFlow's SAME, the paper's."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.asymmetric = padding == 0
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, C, H, W] to [B, C, H/2, W/2]; temb is not used."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsamplingConv2d(channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, C, H, W] to [B, C, 2H, 2W]; temb is not used."""
        return self.conv(x)


class ResnetBlock(nn.Module):
    """GN → SiLU → conv → + temb → GN → SiLU → dropout → conv → + shortcut.

    scale_shift: temb scales and shifts the second normalisation instead (ADM, Dhariwal & Nichol 2021).
    resample: "up" and "down" double and halve height and width, behind the first SiLU and in the shortcut (BigGAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(temb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x: [B, in, H, W], temb: [B, temb_channels], behind its SiLU -> [B, out, H', W']."""
        h = self.norm1(x)
        if self.resample:
            h, x = _resample(h, self.resample), _resample(x, self.resample)
        h = self.norm2(self.conv1(h), self.time_emb_proj(temb))
        h = self.conv2(self.dropout(h))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


def _resample(x: Tensor, how: str) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else F.avg_pool2d(x, 2)


class Attention(nn.Module):
    """Self-attention over the pixels with a residual: softmax(q kᵀ · d^-0.5) v, d the channels of a head."""

    def __init__(self, channels: int, head_channels: int, groups: int | None, eps: float) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])  # a list, for diffusers' name to_out.0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to the same shape: each pixel attends to all."""
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2).contiguous()  # [B, HW, C], copied once for the three products

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (-1, self.head_channels)).transpose(1, 2)  # [B, heads, HW, d]

        h = attention(heads(self.to_q(h)), heads(self.to_k(h)), heads(self.to_v(h)))
        h = self.to_out[0](h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])
