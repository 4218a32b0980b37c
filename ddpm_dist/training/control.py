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

HEAD = 6


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
    full: bool
    """Some rank has no room for another copy in memory."""


class Control:
    """One asynchronous all-reduce a step, on the device where the losses are: nothing waits for it there.

    On CUDA the sums go to pinned host memory behind the reduction, and are read a step later, when they are there.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._values: Tensor | None = None
        self._work: dist.Work | None = None
        self._arrived: torch.cuda.Event | None = None

    def tell(
        self, loss: Tensor, quarter: Tensor, bad_samples: int, stop: bool, preempted: bool, full: bool = False
    ) -> None:
        """Starts the reduction of this step. loss: [B/W] on the world's device. quarter: [B/W] int64 in host memory, in
        which of the draws' times each lies."""
        loss = loss.detach().double()
        sums, counts = quartile_means(quarter.to(loss.device, non_blocking=True), loss)
        head = torch.tensor([loss.numel(), bad_samples, stop, preempted, full], dtype=torch.float64)
        values = torch.cat((loss.sum().view(1), head.to(loss.device, non_blocking=True), sums, counts))
        if self._world.size > 1:
            self._work = dist.all_reduce(values, async_op=True)
        self._values = self._sent_to_host(values) if values.is_cuda else values

    def _sent_to_host(self, values: Tensor) -> Tensor:
        if self._work is not None:
            self._work.wait()  # with NCCL, this makes the stream wait, not the host
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        return host

    def hear(self) -> Shared | None:
        """What was told at the last step, over all ranks; None at the first."""
        if self._values is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        elif self._work is not None:
            self._work.wait()
        values, self._values, self._work = self._values.tolist(), None, None
        loss_sum, images, bad, stop, preempted, full = values[:HEAD]
        sums, counts = values[HEAD : HEAD + QUARTILES], values[HEAD + QUARTILES :]
        return Shared(loss_sum, images, sums, counts, bad, stop > 0, preempted > 0, full > 0)
