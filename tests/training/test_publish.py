"""Snapshots take nothing of a GPU's memory beside the network that trains: average and weights change places."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.diffusion import sample
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World
from ddpm_dist.recipe import parse_config
from ddpm_dist.training import ema as averages
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.publish import SnapshotPublisher
from ddpm_dist.training.step import BatchPlan, training_step
from tests.engine.worker_group import run_ranks, tensors_of

RECIPE = """
run: {url: "file://%s/run"}
data: {url: "memory://none", image_size: 8, channels: 1}
model: {channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], norm_groups: 4, dropout: 0.2}
diffusion: {timesteps: 20}
train: {steps: 10, global_batch: 8, warmup_steps: 0, lr: 0.01}
ema: {decay: 0.5, power: [0.1]}
logging: {grid_images: 6, grid_steps: 3}
"""


def trained(world: World, folder: str, stage: int, precision: str, publish: bool) -> dict[str, Any]:
    """What two steps leave behind, with or without a snapshot between them."""
    averages.EXCHANGED = 1000
    cfg = parse_config(RECIPE % folder, [f"zero.stage={stage}", f"precision={precision}"])
    network, diffusion = snapshot.build(cfg)
    plan = BatchPlan.of(8, world.size, 8)
    engine = Engine(network, cfg, world, plan.micro_batch, plan.accumulation)
    engine.train()
    ema = Ema(engine.pieces(), cfg)
    publisher = SnapshotPublisher(cfg, world, diffusion, None, lambda: None)
    images = torch.arange(plan.share * 64).remainder(251).to(torch.uint8).view(plan.share, 1, 8, 8)
    found: dict[str, Any] = {}
    for step in range(2):
        training_step(engine, diffusion, images + step, None, step, cfg, world, plan, PhaseClock())
        ema.update(step, 8)
        if publish and step == 0:
            before = tensors_of(engine)
            kept = {label: [t.clone() for t in tensors] for label, tensors in ema.averages.items()}
            publisher.publish(ema, engine, 1)
            publisher.close()
            after = tensors_of(engine)
            found["untouched"] = all(torch.equal(before[key], after[key]) for key in before) and all(
                torch.equal(a, b) for label in kept for a, b in zip(kept[label], ema.averages[label], strict=True)
            )
            with ema.computing(engine), engine.evaluating():
                found["grid"] = publisher._sample_grid(engine)
            assert engine._ds.module.training
    found["end"] = {name: tensor for (name, *_), tensor in tensors_of(engine).items()}
    return found


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_snapshot_changes_nothing_and_its_grid_is_the_average_s(tmp_path: Path, stage: int, precision: str) -> None:
    with_one = run_ranks(trained, 2, str(tmp_path), stage, precision, True)
    without = run_ranks(trained, 2, str(tmp_path), stage, precision, False)
    assert all(rank["untouched"] for rank in with_one)
    for a, b in zip(with_one, without, strict=True):
        assert all(torch.equal(a["end"][name], b["end"][name]) for name in a["end"])

    url = f"file://{tmp_path}/run/snapshots/000000001"
    network, diffusion = snapshot.load_snapshot(url)
    settings = parse_config(RECIPE % tmp_path).sampling.model_copy(update={"sampler": "ddim", "steps": 3})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network.to(dtype)
    images = sample(
        lambda x, t, labels: network(x.to(dtype), t, labels).float(),
        diffusion, settings, seed=0, indices=torch.arange(6), shape=(1, 8, 8),
    )  # fmt: skip
    expected = ((images + 1) * 127.5).round().clamp(0, 255)
    for rank in with_one:
        close = (rank["grid"].float() - expected).abs().max()
        assert close <= (0 if precision == "fp32" else 4), close
    assert storage.exists(f"file://{tmp_path}/run/averages/power-0.100/000000001/unet/config.json")
