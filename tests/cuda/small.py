"""A small network that trains on images in memory, by the steps that the loop makes."""

import hashlib

import torch

from ddpm_dist import snapshot
from ddpm_dist.config import Config
from ddpm_dist.diffusion import QUARTILES, LossHistory, bins_of
from ddpm_dist.engine import gather_objects
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World
from ddpm_dist.recipe import parse_config
from ddpm_dist.state.store import StateStore
from ddpm_dist.training.control import Control
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.step import BatchPlan, StepResult, training_step

SMALL = """
run: {url: "memory://cuda", seed: 3}
data: {url: "memory://none", image_size: 8}
model: {channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], dropout: 0.1}
train: {steps: 30, global_batch: 8, max_micro_batch: 4, warmup_steps: 0, lr: 0.001}
logging: {grid_images: 0}
"""


class Steps:
    """Training steps of a small network on images in memory, as the loop makes them."""

    def __init__(self, world: World, *overrides: str) -> None:
        self.cfg: Config = parse_config(SMALL, overrides)
        network, self.diffusion = snapshot.build(self.cfg)
        self.plan = BatchPlan.of(8, world.size, self.cfg.train.max_micro_batch)
        self.world = world
        self.engine = Engine(network, self.cfg, world, self.plan.micro_batch, self.plan.accumulation)
        self.engine.train()
        self.ema = Ema(self.engine.pieces(), self.cfg)
        self.control, self.clock = Control(world), PhaseClock(on_cuda=world.device.type == "cuda")
        generator = torch.Generator().manual_seed(4)
        share = slice(world.rank * self.plan.share, (world.rank + 1) * self.plan.share)
        self.images = torch.randint(0, 256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)[share]
        if world.device.type == "cuda":
            self.images = self.images.pin_memory()
        classes = self.cfg.model.num_classes
        learns_t = self.cfg.diffusion.t_sampling == "loss_second_moment"
        self.history = LossHistory.of(self.diffusion) if learns_t else None
        self.labels = torch.arange(8)[share] % classes if classes else None

    def one(self, step: int) -> StepResult:
        result = training_step(
            self.engine, self.diffusion, self.images, self.labels, step, self.cfg, self.world, self.plan, self.clock,
            self.history,
        )  # fmt: skip
        if result.report.applied:
            self.ema.update(step, 8)
        if self.history is not None:
            bins = bins_of(self.diffusion, self.cfg.diffusion, result.t, len(self.history.counts))
            ranks = gather_objects(self.world, (bins, result.loss.cpu()))
            self.history.update(torch.cat([t for t, _ in ranks]), torch.cat([loss for _, loss in ranks]))
        self.control.hear()
        self.control.tell(
            result.loss, bins_of(self.diffusion, self.cfg.diffusion, result.t, QUARTILES), 0, False, False
        )
        return result

    def digest(self) -> str:
        """SHA-256 of this rank's weights, moments and averages, and of what belongs to the optimizer beside them."""
        found = hashlib.sha256(repr(self.engine.scalars()).encode())
        for piece in self.engine.pieces():
            for tensor in (piece.weights, piece.exp_avg, piece.exp_avg_sq):
                found.update(tensor.cpu().numpy().tobytes())
        for tensors in self.ema.averages.values():
            for tensor in tensors:
                found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def store(self) -> StateStore:
        return StateStore(self.cfg, self.world)
