"""A step on tensors without values: whatever reads one, or has been left on another device, raises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist import snapshot
from ddpm_dist.config import Config
from ddpm_dist.diffusion import QUARTILES, LossHistory, bins_of, sample
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.engine import StepReport, World
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.control import Control
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.step import BatchPlan, training_step

META = torch.device("meta")
WORLD = World(0, 1, 0, META, "gloo")
RECIPE = """
run: {url: "memory://meta"}
data: {url: "memory://meta/data", image_size: 8}
model: {channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], dropout: 0.1}
train: {steps: 10, global_batch: 8, max_micro_batch: 4}
precision: fp32
"""


class Bare:
    """What a step needs of an engine, without DeepSpeed, whose decision about the norm is the one read of a step."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.backwards = 0

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        found: Tensor = self.network(x, t, labels)
        return found

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.backwards += 1

    def step(self, lr: float) -> StepReport:
        return StepReport(True, 1.0, 1.0)


def build(*overrides: str) -> tuple[Config, Any, Any]:
    cfg = parse_config(RECIPE, overrides)
    network, diffusion = snapshot.build(cfg)
    return cfg, network.to(META), diffusion


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.t_sampling=stratified"],
        ["diffusion.t_sampling=loss_second_moment"],
        ["model.num_classes=3", "diffusion.label_dropout=0.2", "diffusion.prediction=v", "diffusion.weighting=min_snr"],
        [
            "diffusion.variance=learned_range",
            "diffusion.loss=hybrid",
            "model.resample=resblock",
            "model.scale_shift=true",
        ],
        ["diffusion.variance=learned", "diffusion.loss=vlb", "model.channels_last=true", "model.checkpoint_levels=[0]"],
        ["diffusion.prediction=x_start", "diffusion.weighting=p2", "diffusion.schedule=cosine"],
        ["diffusion.process=edm", "sampling.steps=5", "diffusion.t_sampling=stratified"],
        ["diffusion.process=flow", "sampling.steps=5", "diffusion.times=log_normal", "diffusion.weighting=min_snr"],
    ],
)
def test_a_step_reads_nothing_from_its_device(overrides: list[str]) -> None:
    cfg, network, diffusion = build(*overrides)
    engine: Any = Bare(network)
    history = LossHistory.of(diffusion) if cfg.diffusion.t_sampling == "loss_second_moment" else None
    plan = BatchPlan.of(8, 1, cfg.train.max_micro_batch)
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.int64) if cfg.model.num_classes else None
    result = training_step(engine, diffusion, images, labels, 3, cfg, WORLD, plan, PhaseClock(), history)
    assert engine.backwards == 2
    assert result.loss.device == META
    assert result.t.device.type == "cpu", "the log and the learned drawing read the times without a wait"
    assert all(p.grad is not None and p.grad.device == META for p in network.parameters())
    control = Control(WORLD)
    control.tell(result.loss, bins_of(diffusion, cfg.diffusion, result.t, QUARTILES), 0, False, False)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guided", [False, True])
def test_samplers_read_nothing_from_their_device(sampler: str, guided: bool) -> None:
    cfg, network, diffusion = build(
        f"sampling.sampler={sampler}", "sampling.steps=5", "sampling.spacing=log_snr", "model.num_classes=3",
        f"sampling.guidance_scale={2.0 if guided else 1.0}",
    )  # fmt: skip
    with torch.no_grad():
        images = sample(
            network, diffusion, cfg.sampling, seed=1, indices=torch.arange(4), shape=(3, 8, 8),
            labels=torch.zeros(4, dtype=torch.int64), null_label=3, device=META,
        )  # fmt: skip
    assert images.device == META
