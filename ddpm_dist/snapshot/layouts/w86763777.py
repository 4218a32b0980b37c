"""w86763777/pytorch-ddpm: ckpt.pt = {net_model, ema_model, sched, optim, step, x_T}.

    time_embedding.timembedding.{0, 1, 3}   head   tail.{0, 2}   middleblocks.{0, 1}
    downblocks.N, upblocks.N: a block {block1.{0, 2}, temb_proj.1, block2.{0, 3}, shortcut, attn.{group_norm, proj_*}},
    or `main`, which halves or doubles the size

The time embedding's fixed table interleaves sines and cosines; ours has the sines first, which is a permutation of the
columns of the layer above it.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.snapshot.layouts.base import Layout, Weights, renamed

TABLE = "time_embedding.timembedding.0.weight"
_TOP = {
    "time_embedding.timembedding.1": "time_embedding.linear_1",
    "time_embedding.timembedding.3": "time_embedding.linear_2",
    "head": "conv_in",
    "tail.0": "conv_norm_out",
    "tail.2": "conv_out",
}
_IN_BLOCK = {
    "block1.0": "resnets.{}.norm1",
    "block1.2": "resnets.{}.conv1",
    "temb_proj.1": "resnets.{}.time_emb_proj",
    "block2.0": "resnets.{}.norm2",
    "block2.3": "resnets.{}.conv2",
    "shortcut": "resnets.{}.conv_shortcut",
    "attn.group_norm": "attentions.{}.group_norm",
    "attn.proj_q": "attentions.{}.to_q",
    "attn.proj_k": "attentions.{}.to_k",
    "attn.proj_v": "attentions.{}.to_v",
    "attn.proj": "attentions.{}.to_out.0",
}


def rename(weights: Weights) -> dict[str, Tensor]:
    homes = {way: _homes(weights, way) for way in ("down", "up")}

    def ours(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if name == TABLE:
            return None
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        if found := re.fullmatch(r"(down|up)blocks\.(\d+)\.(.+)", module):
            level, j = homes[found[1]][int(found[2])]
            owner, part = f"{found[1]}_blocks.{level}", found[3]
            if part == "main":
                return f"{owner}.{found[1]}samplers.0.conv.{leaf}"
        elif found := re.fullmatch(r"middleblocks\.(\d+)\.(.+)", module):
            owner, part, j = "mid_block", found[2], int(found[1])
        else:
            return name
        return f"{owner}.{_IN_BLOCK[part].format(j)}.{leaf}" if part in _IN_BLOCK else name

    found = renamed(weights, ours)
    columns = found["time_embedding.linear_1.weight"]
    found["time_embedding.linear_1.weight"] = torch.cat([columns[:, 0::2], columns[:, 1::2]], dim=1)
    return found


def _homes(weights: Weights, way: str) -> dict[int, tuple[int, int]]:
    """Number in the list -> (level in the order of running, number in the level); `main` ends a level."""
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith(f"{way}blocks.")})
    homes, level, j = {}, 0, 0
    for number in numbers:
        homes[number] = level, j
        ends = f"{way}blocks.{number}.main.weight" in weights
        level, j = (level + 1, 0) if ends else (level, j + 1)
    return homes


def _tells_more(weights: Weights) -> dict[str, Any]:
    return {"diffusion.timesteps": weights[TABLE].shape[0]} if TABLE in weights else {}


LAYOUT = Layout(
    "w86763777/pytorch-ddpm",
    "time_embedding.timembedding.1.weight",
    rename,
    tells={
        "model.norm_groups": 32,
        "model.norm_eps": 1e-5,
        "model.head_channels": None,
        "model.downsample_padding": 1,
        "model.sinusoids": "sin_cos",
        "model.freq_shift": 0,
        "diffusion.schedule": "linear",
        "diffusion.prediction": "eps",
    },
    tells_more=_tells_more,
)
