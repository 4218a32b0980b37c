"""`train:`, `ema:`, `zero:` and `checkpoint:`, the steps of the optimizer and what is kept of them."""

from typing import Annotated, Literal

from pydantic import Field

from ddpm_dist.config.base import Below1, Count, Fraction, Free, Positive, Precision, Schedule, Section


class TrainConfig(Section):
    """Batches and the optimizer."""

    steps: Schedule[Annotated[int, Field(ge=1, le=10**12)]]
    """Optimizer steps of the whole run; may grow later."""
    global_batch: Positive
    """Images in an optimizer step, over all ranks (B)."""
    max_micro_batch: Free[Positive] = 128
    """Most images in one forward pass of a rank; the micro-batch is the largest divisor of B/W up to it."""
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: Count = 5000
    """Steps in which the rate rises linearly from 0."""
    decay_steps: Positive | None = None
    """Step at which the cosine reaches 0."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest L2 norm of the gradient of the global batch."""
    max_nonfinite_steps: Free[Positive] = 20
    """Skipped steps in a row (loss or gradient not finite) after which the run stops."""


class EmaConfig(Section):
    """The moving averages of the weights, of which the first is sampled from."""

    decay: Fraction | None = 0.9999
    """Constant decay per step (the paper); exclusive with halflife_Mimg."""
    halflife_Mimg: Annotated[float, Field(gt=0)] | None = None
    """Half-life in millions of images, independent of the batch size."""
    warmup: bool = False
    """Decay min(decay, (1 + step) / (10 + step)), so that early steps don't weigh on the average."""
    power: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    """Relative widths of further power-function averages (EDM2), for ddpm-posthoc-ema."""


class ZeroConfig(Section):
    """How DeepSpeed deals weights, gradients and moments out to the ranks."""

    stage: Free[Literal[0, 1, 2, 3]] = 1
    offload_optimizer: Free[bool] = False
    """Moments and masters in host memory, with DeepSpeedCPUAdam."""


class CheckpointConfig(Section):
    """When states and snapshots are saved, and which states are kept."""

    every_steps: Free[Positive] = 1000
    memory_every_steps: Free[Positive | None] = None
    """Copies in memory that outlives a worker under Ray, so that no more steps are lost when one dies. Two copies, 8
    bytes a parameter for each of weights, both moments and the averages, over all workers; they are also what a save
    works from."""
    keep_last: Free[Positive] = 2
    """Newest states that are kept; at least two, so that a damaged one has a predecessor. That of the best evaluated
    snapshot stays as well."""
    keep_every_steps: Free[Positive | None] = None
    """States at multiples of this are kept for ever."""
    snapshot_every_steps: Schedule[Positive] = 10000
    """EMA weights to sample from, as a diffusers folder; snapshots are kept."""


def check_train(t: TrainConfig) -> None:
    """A learning rate that is defined at each step; else ValueError."""
    if t.lr_schedule == "cosine" and t.decay_steps is None:
        raise ValueError("train.decay_steps: needed with train.lr_schedule: cosine")
    if t.lr_schedule != "cosine" and t.decay_steps is not None:
        raise ValueError(f"train.decay_steps: train.lr_schedule: {t.lr_schedule} doesn't use it; leave it out")
    if t.decay_steps is not None and t.decay_steps <= t.warmup_steps:
        raise ValueError(f"train.decay_steps: {t.decay_steps} lies within train.warmup_steps: {t.warmup_steps}")


def check_ema(ema: EmaConfig) -> None:
    """One decay, and widths with names of their own; else ValueError."""
    if (ema.decay is None) == (ema.halflife_Mimg is None):
        raise ValueError("ema: give one of ema.decay and ema.halflife_Mimg, and null for the other")
    if len({f"{std:.3f}" for std in ema.power}) < len(ema.power):
        raise ValueError(f"ema.power: {list(ema.power)} are too near to one another; widths are told by 3 decimals")


def check_zero(zero: ZeroConfig, precision: Precision, on_gpu: bool) -> None:
    """A stage that DeepSpeed has for the precision; else ValueError."""
    if zero.offload_optimizer and zero.stage == 0:
        raise ValueError("zero.offload_optimizer: has nothing to move at zero.stage: 0; use zero.stage: 1, 2 or 3")
    if precision == "bf16" and zero.stage == 0:
        raise ValueError("zero.stage: 0 works in fp32 only; use zero.stage: 1 for bf16 and fp16")
    if precision == "fp16" and (zero.stage == 0 or not on_gpu):
        raise ValueError("precision: fp16 needs zero.stage 1-3 and CUDA (cluster.gpus_per_worker: 1); use bf16")
