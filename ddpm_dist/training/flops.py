"""How much arithmetic a training image is, counted on the network itself."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_dist.config import Config
from ddpm_dist.models import UNet
from ddpm_dist.snapshot import network_of

BACKWARD = 2
"""A backward pass computes two products (of inputs and of weights) for each one of the forward pass."""


class Utilisation:
    """Model FLOPs per second and rank, as a share of logging.peak_tflops; nothing where that isn't given."""

    def __init__(self, cfg: Config, ranks: int) -> None:
        self._cfg, self._ranks = cfg, ranks
        self._per_image: float | None = None

    def scalars(self, images_per_second: float) -> dict[str, float]:
        """Of all ranks together."""
        peak = self._cfg.logging.peak_tflops
        if peak is None:
            return {}
        if self._per_image is None:
            self._per_image = training_flops_per_image(self._cfg)
        tflops = self._per_image * images_per_second / self._ranks / 1e12
        return {"speed/model_tflops_per_rank": tflops, "speed/model_flops_utilisation": tflops / peak}


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
