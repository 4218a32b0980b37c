"""DeepSpeed's start: its import when the device is decided, its configuration derived from ours, its engine."""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ddpm_dist.config import Config
from ddpm_dist.engine.world import World

MAX_BUCKET_ELEMENTS = 1 << 25
"""Gradients reduced at once: 128 MiB in float32."""
PERSISTENT_ELEMENTS = 100_000
"""Under ZeRO-3, parameters up to this size stay whole on every rank."""


def load_deepspeed() -> Any:
    """DeepSpeed, imported once the device is decided (`init_world`): at its import it settles on an accelerator."""
    import deepspeed

    # Without this, DeepSpeed compiles a shared-memory extension for CPU collectives at the first start: a minute,
    # a compiler, and a lock that a SIGKILL leaves behind (pytorch#189245). gloo does that work as well.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    return deepspeed


def initialize(network: nn.Module, adam: torch.optim.Optimizer, settings: dict[str, Any], world: World) -> Any:
    """DeepSpeed's engine. It takes LOCAL_RANK for the number of the device, which it isn't where a process sees one,
    and asserts that Open MPI's is the same."""
    told = {name: os.environ[name] for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if name in os.environ}
    os.environ.update(dict.fromkeys(told, str(world.device.index or 0)))
    try:
        # It prints memory figures, whatever the log level.
        with contextlib.redirect_stdout(None), _nothing_to_collect():
            return load_deepspeed().initialize(
                model=network, optimizer=adam, config=settings, dist_init_required=False
            )[0]
    finally:
        os.environ.update(told)


def deepspeed_settings(cfg: Config, world: World, micro_batch: int, accumulation: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, derived from ours. numel: trained elements of the network."""
    bucket = max(1, min(numel, MAX_BUCKET_ELEMENTS))
    settings: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world.size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW; DeepSpeed lists Adam alone
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": cfg.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * MAX_BUCKET_ELEMENTS,
            "overlap_comm": False,  # little gain, and a history of unequal runs (DeepSpeed #5523, #5545, #8364)
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }
    if cfg.zero.stage == 3:
        settings["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    # DeepSpeed's default is 1. Without ZeRO the gradient is clipped before DeepSpeed sees it (zero_layout).
    settings["gradient_clipping"] = cfg.train.grad_clip if cfg.zero.stage > 0 else 0.0
    if cfg.zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif cfg.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0}  # 0: dynamic
    return settings


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """DeepSpeed collects garbage before each of its memory figures: all objects of all packages, several times.

    What exists is set aside meanwhile, unless the process had set it aside for good.
    """
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
