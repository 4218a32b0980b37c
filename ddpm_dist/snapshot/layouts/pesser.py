"""pesser/pytorch_diffusion, the official weights in torch, and forks of ermongroup/ddim: bare state dicts.

temb.dense.0|1   conv_in   down.L.block.I.{norm1, conv1, temb_proj, norm2, conv2, nin_shortcut}
down.L.attn.I.{norm, q, k, v, proj_out}   down.L.downsample.conv   mid.{block_1, attn_1, block_2}
up.L… counted from the full resolution   norm_out   conv_out
"""

import re

from torch import Tensor

from ddpm_dist.snapshot.layouts.base import Layout, Weights, renamed

_TOP = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_MID = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_IN_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def rename(weights: Weights) -> dict[str, Tensor]:
    levels = 1 + max(int(name.split(".")[1]) for name in weights if re.match(r"down\.\d+\.", name))

    def level(way: str, number: str) -> str:
        return f"down_blocks.{number}" if way == "down" else f"up_blocks.{levels - 1 - int(number)}"

    def ours(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        if found := re.fullmatch(r"mid\.(\w+)\.(\w+)", module):
            owner, part = f"mid_block.{_MID.get(found[1], found[1])}", found[2]
        elif found := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", module):
            kind = "resnets" if found[3] == "block" else "attentions"
            owner, part = f"{level(found[1], found[2])}.{kind}.{found[4]}", found[5]
        elif found := re.fullmatch(r"(down|up)\.(\d+)\.(down|up)sample\.conv", module):
            return f"{level(found[1], found[2])}.{found[3]}samplers.0.conv.{leaf}"
        else:
            return name
        inside = _IN_ATTENTION if ".attentions." in owner else _IN_RESNET
        return f"{owner}.{inside.get(part, part)}.{leaf}"

    return renamed(weights, ours)


LAYOUT = Layout(
    "pesser/pytorch_diffusion",
    "temb.dense.0.weight",
    rename,
    tells={
        "model.norm_groups": 32,
        "model.norm_eps": 1e-6,
        "model.head_channels": None,
        "model.downsample_padding": 0,
        "model.sinusoids": "sin_cos",
        "model.freq_shift": 1,
        "diffusion.prediction": "eps",
    },
)
