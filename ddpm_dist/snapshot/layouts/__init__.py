"""Files of weights that other programs wrote: a module for each family says its names, what they mean, and what the
file doesn't tell. None of them reads a file, and none guesses.
"""

from ddpm_dist.snapshot.layouts import diffusers, openai, pesser, w86763777
from ddpm_dist.snapshot.layouts.base import PROCESS, Layout, Weights, structure
from ddpm_dist.snapshot.layouts.openai import split_heads

PESSER = pesser.LAYOUT
LAYOUTS = (PESSER, w86763777.LAYOUT, openai.LAYOUT, diffusers.LAYOUT)

OTHERS = {
    "init_conv.weight": "lucidrains' denoising-diffusion-pytorch (RMSNorm, a 7×7 stem, linear attention)",
    "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight": "diffusers' UNet2DConditionModel (cross-attention)",
    "input_blocks.1.1.transformer_blocks.0.norm1.weight": "latent diffusion's U-Net (cross-attention)",
    "all_modules.0.weight": "yang-song/score_sde_pytorch",
    "all_modules.0.W": "yang-song/score_sde_pytorch",
    "map_layer0.weight": "NVIDIA's EDM",
    "x_embedder.proj.weight": "DiT",
    "patch_embed.proj.weight": "a vision transformer",
}
"""A parameter of other networks -> whose it is; this program's network isn't theirs."""

__all__ = ["LAYOUTS", "OTHERS", "PESSER", "PROCESS", "Layout", "Weights", "split_heads", "structure"]
