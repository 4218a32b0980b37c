"""Networks that the tests of models, snapshots and tools share."""

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.config import ModelConfig
from ddpm_dist.models.config import UNetConfig
from ddpm_dist.models.unet import UNet

TINY = ModelConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), norm_groups=8)


def tiny_config(learned: bool = False, **changes: Any) -> UNetConfig:
    """A network of 16² images with attention, of about 0.1 M parameters."""
    return UNetConfig.from_recipe(TINY.model_copy(update=changes), image_size=16, channels=3, learned_variance=learned)


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> Any:
    """Weights under which every parameter matters to the output (the paper's initialisation hides most)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            parameter.copy_(0.1 * noise + (1.0 if parameter.mean() == 1 else 0.0))
    return module


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    return randomize(UNet(config).initialize(0), seed)


def inputs(config: UNetConfig, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, labels) at random."""
    generator = torch.Generator().manual_seed(seed)
    size, classes = config.sample_size, config.num_class_embeds
    x = torch.randn(batch, config.in_channels, size, size, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    labels = None if classes is None else torch.randint(classes, (batch,), generator=generator)
    return x, t, labels


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
