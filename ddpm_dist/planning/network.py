"""What a recipe's network is in numbers, counted on the network itself: no formula of its layers, no memory."""

from dataclasses import dataclass

import torch

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
    one, three = _saved_bytes(cfg, 1), _saved_bytes(cfg, 3)
    each = (three - one) // 2
    return Counted(numels, training_flops_per_image(cfg), each, one - each)


def _saved_bytes(cfg: Config, batch: int) -> int:
    """Bytes of all tensors that autograd saves in a forward pass in training, each storage once, without parameters.

    torch's own account (`saved_tensors_hooks`), so levels that are recomputed count as what they keep.
    """
    dtype, size = _DTYPES[cfg.precision], cfg.data.image_size
    with torch.device("meta"):
        network = UNet(network_of(cfg)).to(dtype).train()
        x = torch.empty(batch, cfg.data.channels, size, size, dtype=dtype)
        t = torch.empty(batch, dtype=torch.int64)
        labels = torch.empty(batch, dtype=torch.int64) if cfg.model.num_classes else None
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}
        held: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no number is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                held[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(x, t, labels)
    return sum(storage.nbytes() for storage in held.values())
