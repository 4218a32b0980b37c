"""OpenAI's improved-diffusion and guided-diffusion: bare state dicts.

    time_embed.{0, 2}   label_emb   input_blocks.N.M   middle_block.{0, 1, 2}   output_blocks.N.M   out.{0, 2}
    a block: in_layers.{0, 2}, emb_layers.1, out_layers.{0, 3}, skip_connection; attention: norm, qkv, proj_out
    between levels: op, conv, or a block (resblock_updown)

Both lists have levels · (blocks + 1) entries. How many heads there are, and whether a head's q, k and v lie together
(the older order) or all q before all k, isn't in the file.
"""

import re
from typing import Any

from torch import Tensor

from ddpm_dist.errors import SnapshotError
from ddpm_dist.snapshot.layouts.base import Layout, Weights, renamed

_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "qkv": "to_qkv",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}


def rename(weights: Weights) -> dict[str, Tensor]:
    each = _entries_of_a_level(weights)

    def owner(way: str, number: int, place: str) -> str | None:
        """Of `input_blocks.number.place` and the like."""
        level, j = divmod(number - 1 if way == "input" else number, each)
        first = f"{way}_blocks.{number}.{place}"
        is_block = f"{first}.in_layers.0.weight" in weights
        if way == "input":
            if j == each - 1:
                return f"down_blocks.{level}.downsamplers.0"
            return f"down_blocks.{level}.{'resnets' if is_block else 'attentions'}.{j}"
        if is_block and place == "0":
            return f"up_blocks.{level}.resnets.{j}"
        if is_block or f"{first}.conv.weight" in weights:
            return f"up_blocks.{level}.upsamplers.0"
        return f"up_blocks.{level}.attentions.{j}"

    def ours(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", module):
            home, part = owner(found[1], int(found[2]), found[3]), found[4]
        elif found := re.fullmatch(r"middle_block\.(\d)\.(.+)", module):
            home, part = _MIDDLE.get(found[1]), found[2]
        else:
            return name
        return f"{home}.{_PARTS[part]}.{leaf}" if home is not None and part in _PARTS else name

    return renamed(weights, ours)


def _entries_of_a_level(weights: Weights) -> int:
    """Blocks of a level on the way up: the first entry that changes the level is its last."""
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("output_blocks.")})
    if not numbers:
        raise SnapshotError("a classifier and no U-Net: it has no output_blocks")
    for number in numbers:
        places = {name.split(".")[2] for name in weights if name.startswith(f"output_blocks.{number}.")} - {"0"}
        for place in places:
            first = f"output_blocks.{number}.{place}"
            if f"{first}.conv.weight" in weights or f"{first}.in_layers.0.weight" in weights:
                return number + 1
    return len(numbers)


def split_heads(weights: Weights, heads: dict[int, int], together: bool) -> dict[str, Tensor]:
    """`to_qkv` as to_q, to_k and to_v. heads: channels -> heads. together: a head's q, k and v lie together."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        owner, fused, leaf = name.partition(".to_qkv.")
        if not fused:
            found[name] = value
            continue
        channels = value.shape[0] // 3
        groups = heads[channels] if together else 1
        parts = value.reshape(groups, 3, channels // groups, *value.shape[1:]).unbind(dim=1)
        for part, tensor in zip("qkv", parts, strict=True):
            found[f"{owner}.to_{part}.{leaf}"] = tensor.reshape(channels, *value.shape[1:])
    return found


def _tells_more(weights: Weights) -> dict[str, Any]:
    inputs, outputs = weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0]
    if outputs not in (inputs, 2 * inputs) or inputs > 3:
        raise SnapshotError(
            f"it takes {inputs} channels and gives {outputs}: a super-resolution network, not one of images alone"
        )
    return {"diffusion.variance": "learned_range"} if outputs == 2 * inputs else {}


LAYOUT = Layout(
    "OpenAI's improved- and guided-diffusion",
    "input_blocks.0.0.weight",
    rename,
    tells={
        "model.norm_groups": 32,
        "model.norm_eps": 1e-5,
        "model.downsample_padding": 1,
        "model.sinusoids": "cos_sin",
        "model.freq_shift": 0,
    },
    tells_more=_tells_more,
)
