"""One optimizer step of DDPM training: the paper's Algorithm 1 over this rank's share of the global batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import Config
from ddpm_dist.diffusion import LossHistory, Process, draw_t, drop_labels, training_losses
from ddpm_dist.engine import Engine, StepReport, World
from ddpm_dist.rng import Purpose
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.optim import lr_at


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch of B images is cut for W ranks: contract 1 of ARCHITECTURE.md."""

    share: int
    """Images of a rank, B / W."""
    micro_batch: int
    """Images of one forward pass: the largest divisor of the share up to train.max_micro_batch."""
    accumulation: int
    """Forward and backward passes in a step."""

    @classmethod
    def of(cls, global_batch: int, world_size: int, max_micro_batch: int) -> "BatchPlan":
        """Of B images for W ranks; W divides B."""
        share, rest = divmod(global_batch, world_size)
        assert rest == 0, "the configuration admits only worlds that divide the batch"
        micro = max(m for m in range(1, min(share, max_micro_batch) + 1) if share % m == 0)
        return cls(share, micro, share // micro)

    def advice(self, world_size: int, max_micro_batch: int) -> str | None:
        """A remark where the share has no divisor near train.max_micro_batch, so that a step takes needlessly many
        passes; None where the batch is cut well."""
        fewest = -(-self.share // max_micro_batch)
        if self.accumulation <= 2 * fewest:
            return None
        better = -(-self.share // fewest) * fewest * world_size
        return (
            f"train.global_batch: {self.share * world_size} gives each of {world_size} workers {self.share} images, "
            f"which go in {self.accumulation} passes of {self.micro_batch}, as {self.share} has no larger divisor up "
            f"to train.max_micro_batch: {max_micro_batch}; {better} would go in {fewest}"
        )


@dataclass(frozen=True)
class StepResult:
    """What one rank saw in a step."""

    t: Tensor
    """[B/W] int64, or float64 of a continuous process: the diffusion times, in host memory."""
    loss: Tensor
    """[B/W] float32, the loss of each image before the mean, on the device."""
    report: StepReport


def training_step(
    engine: Engine,
    diffusion: Process,
    images: Tensor,
    labels: Tensor | None,
    step: int,
    cfg: Config,
    world: World,
    plan: BatchPlan,
    clock: PhaseClock,
    history: LossHistory | None = None,
) -> StepResult:
    """Algorithm 1 of Ho et al. 2020 for step `step`, from 0.

    images: [B/W, C, H, W] uint8, the places [rB/W, (r+1)B/W) of the global batch. labels: [B/W] int64 or None.
    t and eps of the image at place p depend on (seed, step, p) alone, not on the number of ranks. Times and dropped
    classes are drawn on the host; the device is read once, for the decision of the gradient's norm.
    """
    seed, batch = cfg.run.seed, cfg.train.global_batch
    with clock.phase("forward"):
        places = torch.arange(world.rank * plan.share, (world.rank + 1) * plan.share)
        x_start = to_model_range(images.to(world.device, non_blocking=True))
        drawn, weight = draw_t(diffusion, cfg.diffusion, seed, step, places, batch, history)
        t, weight = (one.to(world.device, non_blocking=True) for one in (drawn, weight))
        image_numbers = (places + step * batch).to(world.device, non_blocking=True)
        eps = rng.normal(seed, Purpose.EPS, image_numbers, x_start.shape[1:])
        y = _classes(labels, places, step, cfg, world)
        if cfg.model.dropout:
            torch.manual_seed(rng.fold(seed, step, world.rank))  # dropout's masks depend on this step alone

    losses = []
    for i in range(0, plan.share, plan.micro_batch):
        part = slice(i, i + plan.micro_batch)
        y_part = None if y is None else y[part]
        with clock.phase("forward"):
            found = training_losses(diffusion, engine, x_start[part], t[part], eps[part], y_part, cfg.diffusion)
            loss = _nan_unless_finite((weight[part] * found.loss).mean())
        with clock.phase("backward"):
            engine.backward(loss)
        losses.append(found.loss.detach())
    with clock.phase("step"):
        report = engine.step(lr_at(cfg.train, step))
    return StepResult(drawn, torch.cat(losses), report)


def _classes(labels: Tensor | None, places: Tensor, step: int, cfg: Config, world: World) -> Tensor | None:
    """What the network is told of the classes: [B/W] int64 with some dropped for guidance; None if unconditional."""
    null, probability = cfg.model.num_classes, cfg.diffusion.label_dropout
    if labels is None or null is None:
        return None
    if probability:
        labels = drop_labels(labels, null, probability, cfg.run.seed, step, places, cfg.train.global_batch)
    return labels.to(world.device, non_blocking=True)


def _nan_unless_finite(loss: Tensor) -> Tensor:
    """A loss that isn't finite gets a gradient that isn't, on any rank: so the engine leaves out its step on all."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def to_model_range(images: Tensor) -> Tensor:
    """[B, C, H, W] uint8 in 0..255 to float32 in [-1, 1] (section 3.3 of Ho et al. 2020)."""
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0
