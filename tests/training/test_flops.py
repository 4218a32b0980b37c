"""FLOPs against figures that were counted by others."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_dist.recipe import load_config
from ddpm_dist.snapshot import network_of
from ddpm_dist.training.flops import training_flops_per_image

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_three_forward_passes_of_diffusers_network_less_what_upsampling_saves(name: str) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml", ["run.url=memory://run", "data.url=memory://data"])
    settings = {k: v for k, v in network_of(cfg).to_diffusers().items() if not k.startswith("_")}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        size = cfg.data.image_size
        UNet2DModel(**settings)(torch.empty(1, cfg.data.channels, size, size), torch.empty(1, dtype=torch.int64))
    # Our upsampling and its convolution are one transposed convolution with 4/9 of the products.
    assert 0.9 < training_flops_per_image(cfg) / (3 * counter.get_total_flops()) < 1
