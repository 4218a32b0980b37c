"""What the ranks tell one another at each step, in one small all-reduce that is read one step later.

So nobody waits for it: the reduction of step s runs beside the computation of step s + 1. Losses reach the
log, and a request to stop reaches every rank, one step after they arose, at the same step everywhere.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist.diffusion import QUARTILES, quartile_means
from ddpm_dist.engine import World

HEAD = 5


@dataclass(frozen=True)
class Shared:
    """Sums over all ranks for one step."""

    loss_sum: float
    images: float
    quartile_loss_sum: list[float]
    quartile_images: list[float]
    bad_samples: float
    stop: bool
    """Some rank was asked to save and leave."""
    preempted: bool
    """Some rank's node is about to be taken away: save, and leave it to another attempt without that node."""


class Control:
    """One asynchronous all-reduce a step, over gloo also where the gradients go over NCCL."""

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.size > 1 and world.backend != "gloo" else None
        self._world = world
        self._values: Tensor | None = None
        self._work: dist.Work | None = None

    def tell(self, loss: Tensor, t: Tensor, timesteps: int, bad_samples: int, stop: bool, preempted: bool) -> None:
        """Starts the reduction of this step. loss, t: [B/W] on any device."""
        loss = loss.detach().double().cpu()
        sums, counts = quartile_means(t.cpu(), loss, timesteps)
        head = torch.tensor([loss.sum(), loss.numel(), bad_samples, stop, preempted], dtype=torch.float64)
        self._values = torch.cat((head, sums, counts))
        if self._world.size > 1:
            self._work = dist.all_reduce(self._values, group=self._group, async_op=True)

    def hear(self) -> Shared | None:
        """What was told at the last step, over all ranks; None at the first."""
        if self._values is None:
            return None
        if self._work is not None:
            self._work.wait()
        values, self._values, self._work = self._values.tolist(), None, None
        loss_sum, images, bad, stop, preempted = values[:HEAD]
        sums, counts = values[HEAD : HEAD + QUARTILES], values[HEAD + QUARTILES :]
        return Shared(loss_sum, images, sums, counts, bad, stop > 0, preempted > 0)
