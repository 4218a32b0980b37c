"""How many images a worker computes at once: found by doing what sampling does, with more and more of them."""

import logging
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_dist import device as devices
from ddpm_dist.errors import SamplingError
from ddpm_dist.host_memory import available_bytes

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory that a batch may take."""


@torch.no_grad()
def largest_batch(attempt: Callable[[int], None], bound: int, device: torch.device) -> int:
    """The largest power of two, up to the bound, of which `attempt` takes at most MEMORY_SHARE of the free memory.

    attempt: makes a step of so many images, and holds nothing of it afterwards. SamplingError if not one fits.
    """
    free = _free_bytes(device)
    batch = 1
    while True:
        before = _used_bytes(device)
        try:
            attempt(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise SamplingError(
                    f"not one image fits the {free / 2**30:.1f} GiB that this worker may take of "
                    f"{devices.name(device)}; use sampling.precision: bf16, a larger cluster.gpus_per_worker, or a GPU "
                    "that others leave alone (nvidia-smi names them)"
                ) from None
            return batch // 2
        used = _peak_bytes(device) - before
        log.debug("%d images take %.2f of %.2f GiB", batch, used / 2**30, free / 2**30)
        if 2 * batch > bound or 2 * used > MEMORY_SHARE * free:
            return batch
        batch *= 2


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return devices.free_bytes(device)
    return available_bytes()


def _used_bytes(device: torch.device) -> int:
    """What is taken now; on a GPU what torch holds of it, as the pools of recorded graphs are held, not allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_reserved(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
