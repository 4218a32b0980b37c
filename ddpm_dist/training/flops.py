"""How much arithmetic a training image is, counted on the network itself."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_dist.config import Config
from ddpm_dist.models import UNet
from ddpm_dist.snapshot import network_of

BACKWARD = 2
"""A backward pass computes two products (of inputs and of weights) for each one of the forward pass."""


def training_flops_per_image(cfg: Config) -> float:
    """FLOPs (a multiply-add counts as 2) of forward and backward for one image, without recomputation.

    Counted by PyTorch's dispatcher on tensors without memory, so it costs milliseconds at any size.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
        t = torch.empty(1, dtype=torch.int64)
        labels = torch.empty(1, dtype=torch.int64) if cfg.model.num_classes else None
        UNet(network_of(cfg))(x, t, labels)
    return float((1 + BACKWARD) * counter.get_total_flops())
