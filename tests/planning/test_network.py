"""What is counted of a network: its parameters, its arithmetic, and what a forward pass keeps."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ddpm_dist import snapshot
from ddpm_dist.config import Config
from ddpm_dist.models import UNet
from ddpm_dist.planning import count
from ddpm_dist.recipe import load_config
from ddpm_dist.training import training_flops_per_image

URLS = ("run.url=file:///run", "data.url=file:///data")


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, [*URLS, *overrides])


@pytest.mark.parametrize(("name", "parameters"), [("cifar10", 35_746_307), ("lsun256", 113_673_219)])
def test_parameters_and_flops_are_those_of_the_network(name: str, parameters: int) -> None:
    """Ho et al. 2020, appendix B: 35.7 and 114 million."""
    cfg = recipe(name)
    counted = count(cfg)
    assert counted.parameters == parameters
    with torch.device("meta"):
        built = UNet(snapshot.network_of(cfg))
    assert counted.numels == tuple(p.numel() for p in built.parameters())
    assert counted.training_flops == training_flops_per_image(cfg)


def allocated(cfg: Config, batch: int) -> int:
    """Bytes that torch's allocator gave and didn't get back in a forward pass whose output is held."""
    network = snapshot.build(cfg)[0].train()
    x = torch.zeros(batch, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    t = torch.zeros(batch, dtype=torch.int64)
    network(x, t).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = network(x, t)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


OVERRIDES = [
    ("model.dropout=0.1",),
    ("model.scale_shift=false", "model.channels=64"),
    ("model.checkpoint_levels=[0, 1]",),
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_activations_are_what_the_allocator_gives(overrides: tuple[str, ...]) -> None:
    cfg = recipe("digits", "precision=fp32", *overrides)
    counted = count(cfg)
    estimated = counted.activation_bytes * 16 + counted.fixed_bytes
    assert estimated == pytest.approx(allocated(cfg, 16), rel=0.12)


def test_recomputed_levels_keep_less_and_bf16_about_half() -> None:
    plain = recipe("digits", "precision=fp32")
    less = recipe("digits", "precision=fp32", "model.checkpoint_levels=[0]")
    assert count(less).activation_bytes < 0.8 * count(plain).activation_bytes
    assert 0.4 < count(recipe("digits")).activation_bytes / count(plain).activation_bytes < 0.7
