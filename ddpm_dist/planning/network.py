"""What a recipe's network is in numbers, counted on the network itself: no formula of its layers, no memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_dist.config import Config
from ddpm_dist.models import UNet
from ddpm_dist.snapshot import network_of
from ddpm_dist.training import training_flops_per_image

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of an element that the network computes with."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Counted:
    """A network and its cost for one image."""

    numels: tuple[int, ...]
    """Elements of each trained parameter, in the network's order."""
    training_flops: float
    """Forward and backward of one image; a multiply-add counts as 2."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, for each image of a micro-batch."""
    fixed_bytes: int
    """What it keeps beside the parameters whatever the micro-batch is."""

    @property
    def parameters(self) -> int:
        """Trained elements."""
        return sum(self.numels)


def count(cfg: Config) -> Counted:
    """Counts a recipe's network on tensors without memory; a second at any size."""
    with torch.device("meta"):
        numels = tuple(p.numel() for p in UNet(network_of(cfg)).parameters() if p.requires_grad)
    one, three = _held_bytes(cfg, 1), _held_bytes(cfg, 3)
    each = (three - one) // 2
    return Counted(numels, training_flops_per_image(cfg), each, one - each)


def _held_bytes(cfg: Config, batch: int) -> int:
    """Bytes of all that a forward pass in training made and that is still held at its end, each storage once.

    Whatever holds it: autograd, or the inputs that a recomputed level keeps.
    """
    dtype, size = _DTYPES[cfg.precision], cfg.data.image_size
    with torch.device("meta"):
        network = UNet(network_of(cfg)).checkpoint(cfg.model.checkpoint_levels).to(dtype).train()
        x = torch.empty(batch, cfg.data.channels, size, size, dtype=dtype)
        t = torch.empty(batch, dtype=torch.int64)
        labels = torch.empty(batch, dtype=torch.int64) if cfg.model.num_classes else None
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}  # of which operations make views
        with _Made() as made:
            output = network(x, t, labels)
    held = {ref.cdata: count for ref, count in made.storages if not ref.expired() and ref.cdata not in parameters}
    del output
    return sum(held.values())


class _Made(TorchDispatchMode):
    """Remembers the storages that operations make, without holding them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        return result
