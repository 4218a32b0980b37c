"""Learning rates as pure functions of the step."""

import math

from ddpm_dist.config import TrainConfig


def lr_at(cfg: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up from 0, then the schedule.

    As in the official code of Ho et al. 2020, the rate is `lr · min(step / warmup_steps, 1)`, so the first
    step of a warm-up has rate 0.
    """
    warmup = min(step / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
    return cfg.lr * warmup * SCHEDULES[cfg.lr_schedule](cfg, step)


def _constant(cfg: TrainConfig, step: int) -> float:
    return 1.0


def _cosine(cfg: TrainConfig, step: int) -> float:
    """From 1 at the end of the warm-up to 0 at decay_steps (Loshchilov & Hutter 2017, eq. 5, one cycle)."""
    assert cfg.decay_steps is not None, "the configuration asks for decay_steps with a cosine"
    length = max(cfg.decay_steps - cfg.warmup_steps, 1)
    progress = min(max(step - cfg.warmup_steps, 0) / length, 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _inverse_sqrt(cfg: TrainConfig, step: int) -> float:
    """1 up to the end of the warm-up, then falling as 1/√step (Vaswani et al. 2017, section 5.3)."""
    reference = max(cfg.warmup_steps, 1)
    return math.sqrt(reference / max(step, reference))


SCHEDULES = {"constant": _constant, "cosine": _cosine, "inverse_sqrt": _inverse_sqrt}
