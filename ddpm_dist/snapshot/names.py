"""Weights under other names: diffusers' legacy attention, and the official code's variables.

Everything here maps {name: array}; files are read by the caller.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.errors import SnapshotError
from ddpm_dist.models import UNet, UNetConfig

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention's projections in diffusers' files before 0.14, and now."""

FORMER_PARTS = {"mid": "mid_block", "downsample_blocks": "down_blocks", "upsample_blocks": "up_blocks"}
"""Names of the network's parts in the first hosted files, and now."""

EMA_SUFFIX = "/ExponentialMovingAverage"
"""What TensorFlow 1 appends to the name of a variable's shadow."""


def modern_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of diffusers with current names; 1×1 convolutions of attention become linear layers.

    The first files name a downsampling's convolution twice, as `op` and as `conv`.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        name = f"{FORMER_PARTS.get(part, part)}.{rest}"
        if former := re.fullmatch(r"(.*samplers\.0)\.op\.(weight|bias)", name):
            name = f"{former[1]}.conv.{former[2]}"
            if name in renamed:
                continue
        legacy = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        if legacy:
            name = f"{legacy[1]}.{LEGACY_ATTENTION[legacy[2]]}.{legacy[3]}"
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[name] = value
    return renamed


def load_into(unet: UNet, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into the network in float32; SnapshotError naming the first that is missing, extra or misshapen.

    `source` stands in the message.
    """
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    for text, names in (("lacks", wanted.keys() - weights.keys()), ("has unknown", weights.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SnapshotError(f"{source} {text} {min(names)}{more}: its config doesn't describe these weights")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise SnapshotError(
                f"{source}: {name} has the shape {tuple(weights[name].shape)}; its config makes it {shape}"
            )
        if not weights[name].is_floating_point():
            raise SnapshotError(f"{source}: {name} holds {weights[name].dtype}; weights are floating-point numbers")
    unet.load_state_dict(weights)


def from_official(variables: Mapping[str, np.ndarray], config: UNetConfig, ema: bool) -> dict[str, Tensor]:
    """Weights of the official code's variables (hojonathanho/diffusion, TensorFlow 1), as of an .npz.

    Names may begin with `model/` and end with the EMA's suffix. With `ema` the shadows are taken, and an error
    says so if there are none; otherwise the variables themselves. Optimizer slots and step counters are left out.
    """
    ours: dict[str, Tensor] = {}
    for name, value in variables.items():
        is_ema = name.endswith(EMA_SUFFIX)
        path = name.removesuffix(EMA_SUFFIX).removesuffix(":0").removeprefix("model/")
        target = _official_name(path, config.levels)
        if target is not None and is_ema == ema:
            ours[target] = torch.from_numpy(_official_layout(target, np.asarray(value, dtype=np.float32)))
    if not ours:
        other = "without" if ema else "with"
        raise SnapshotError(
            f"no variable such as model/conv_in/W{EMA_SUFFIX if ema else ''} among the {len(variables)} given; "
            f"the file may hold them {other} the suffix {EMA_SUFFIX}"
        )
    return ours


_TOP = {
    "temb/dense0": "time_embedding.linear_1",
    "temb/dense1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "mid/block_1": "mid_block.resnets.0",
    "mid/attn_1": "mid_block.attentions.0",
    "mid/block_2": "mid_block.resnets.1",
}
_IN_LEVEL = {"block": "resnets", "attn": "attentions"}
_IN_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEAF = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


def _official_name(path: str, levels: int) -> str | None:
    """Our name of `down_0/block_1/conv1/W` and the like; none for what isn't a weight of the network."""
    module, _, leaf = path.rpartition("/")
    if leaf not in _LEAF:
        return None
    if module in _TOP:
        return f"{_TOP[module]}.{_LEAF[leaf]}"
    block, _, part = module.rpartition("/")
    if block in _TOP:
        owner = _TOP[block]
    elif level := re.fullmatch(r"(down|up)_(\d+)/(block|attn)_(\d+)", block):
        owner = f"{_official_level(level[1], int(level[2]), levels)}.{_IN_LEVEL[level[3]]}.{level[4]}"
    elif level := re.fullmatch(r"(down|up)_(\d+)/(down|up)sample", block):
        owner = f"{_official_level(level[1], int(level[2]), levels)}.{level[3]}samplers.0"
    else:
        return None
    inside = _IN_ATTENTION if "attentions" in owner else _IN_RESNET
    return f"{owner}.{inside.get(part, part)}.{_LEAF[leaf]}"


def _official_level(way: str, level: int, levels: int) -> str:
    """The official code counts levels from the full resolution on both ways; diffusers counts up blocks as they run."""
    return f"down_blocks.{level}" if way == "down" else f"up_blocks.{levels - 1 - level}"


def _official_layout(name: str, value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW for convolutions, [in, out] -> [out, in] for dense layers, [in, out] -> [out, in, 1, 1] for NIN."""
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    if value.ndim == 2:
        value = np.ascontiguousarray(value.T)
        return value[:, :, None, None] if ".conv_shortcut." in name else value
    return value
