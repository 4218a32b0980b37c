"""The official code's variables (hojonathanho/diffusion, TensorFlow 1) of a UNet2DModel state dict: ours backwards.

Written from the table of names alone, block by block in the order of the official `model()`, not from our reader.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ddpm_dist.models.config import UNetConfig


def official_variables(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, np.ndarray]:
    """{"model/down_0/block_0/conv1/W": HWIO array, …}."""
    variables: dict[str, np.ndarray] = {}

    def put(theirs: str, ours: str, kind: str) -> None:
        weight = weights[f"{ours}.weight"].detach().numpy()
        leaves = ("gamma", "beta") if kind == "norm" else ("W", "b")
        if kind == "conv":
            weight = np.transpose(weight, (2, 3, 1, 0))  # OIHW -> HWIO
        elif kind == "dense":
            weight = weight.reshape(weight.shape[:2]).T  # NIN shortcuts are [out, in, 1, 1] with us
        variables[f"model/{theirs}/{leaves[0]}"] = weight
        variables[f"model/{theirs}/{leaves[1]}"] = weights[f"{ours}.bias"].detach().numpy()

    def resnet(theirs: str, ours: str) -> None:
        for part, kind in (("norm1", "norm"), ("conv1", "conv"), ("norm2", "norm"), ("conv2", "conv")):
            put(f"{theirs}/{part}", f"{ours}.{part}", kind)
        put(f"{theirs}/temb_proj", f"{ours}.time_emb_proj", "dense")
        if f"{ours}.conv_shortcut.weight" in weights:
            put(f"{theirs}/nin_shortcut", f"{ours}.conv_shortcut", "dense")

    def attention(theirs: str, ours: str) -> None:
        put(f"{theirs}/norm", f"{ours}.group_norm", "norm")
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            put(f"{theirs}/{part}", f"{ours}.{name}", "dense")

    put("temb/dense0", "time_embedding.linear_1", "dense")
    put("temb/dense1", "time_embedding.linear_2", "dense")
    put("conv_in", "conv_in", "conv")
    last = config.levels - 1
    for level in range(config.levels):
        for way, row, blocks in (
            ("down", level, config.layers_per_block),
            ("up", last - level, config.layers_per_block + 1),
        ):
            for j in range(blocks):
                resnet(f"{way}_{level}/block_{j}", f"{way}_blocks.{row}.resnets.{j}")
                if f"{way}_blocks.{row}.attentions.{j}.to_q.weight" in weights:
                    attention(f"{way}_{level}/attn_{j}", f"{way}_blocks.{row}.attentions.{j}")
        if level != last:
            put(f"down_{level}/downsample/conv", f"down_blocks.{level}.downsamplers.0.conv", "conv")
        if level != 0:
            put(f"up_{level}/upsample/conv", f"up_blocks.{last - level}.upsamplers.0.conv", "conv")
    resnet("mid/block_1", "mid_block.resnets.0")
    attention("mid/attn_1", "mid_block.attentions.0")
    resnet("mid/block_2", "mid_block.resnets.1")
    put("norm_out", "conv_norm_out", "norm")
    put("conv_out", "conv_out", "conv")
    return variables
