"""Steps that were not applied, because a loss or a gradient wasn't finite: kept for the reader, and counted."""

import json
import logging
from collections.abc import Callable

import torch

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.data import Batch
from ddpm_dist.engine import LOWEST_LOSS_SCALE, World
from ddpm_dist.errors import NonFiniteError, StorageError
from ddpm_dist.training.step import StepResult

log = logging.getLogger(__name__)


class SkippedSteps:
    """Counts skipped steps in a row and publishes what each rank saw in them to `failures/`."""

    def __init__(self, cfg: Config, world: World, check_owner: Callable[[], None]) -> None:
        """check_owner: raises if this attempt may publish nothing more."""
        self._cfg, self._world, self._check_owner = cfg, world, check_owner
        self.in_a_row = 0
        self.total = 0

    def see(self, step: int, batch: Batch, result: StepResult) -> None:
        """Raises NonFiniteError after train.max_nonfinite_steps skipped steps in a row, on all ranks at once.

        Under fp16 a scale that was too high is halved, which is no failure, as long as there is something to halve.
        The ranks share the scale, and so agree on that; a loss of its own that isn't finite each one keeps a record of.
        """
        if result.report.applied:
            self.in_a_row = 0
            return
        halved = self._cfg.precision == "fp16" and result.report.loss_scale > LOWEST_LOSS_SCALE
        if halved and bool(torch.isfinite(result.loss).all()):
            return
        if not halved:
            self.in_a_row += 1
            self.total += 1
        where = storage.join(self._cfg.run.url, "failures", f"step-{step:09d}-rank-{self._world.rank:05d}.json")
        log.warning("step %d was not applied: the loss or the gradient is not finite; see %s", step, where)
        try:
            self._check_owner()
            storage.publish(where, json.dumps(self._describe(step, batch, result), indent=1).encode())
        except StorageError as error:
            log.warning("it could not be written: %s", error)
        if self.in_a_row >= self._cfg.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row up to step {step} had a loss or gradient that isn't finite; their t, "
                f"sample keys and losses are in {storage.join(self._cfg.run.url, 'failures')}; lower train.lr or "
                "look at the data, then start again: the last state was saved before"
            )

    def _describe(self, step: int, batch: Batch, result: StepResult) -> dict[str, object]:
        images = batch.images.float()
        return {
            "step": step,
            "epoch": batch.epoch,
            "grad_norm": repr(result.report.grad_norm),
            "loss_scale": result.report.loss_scale,
            "images": {"min": images.min().item(), "mean": images.mean().item(), "max": images.max().item()},
            "samples": [
                {"key": key, "t": t, "loss": repr(loss)}
                for key, t, loss in zip(batch.keys, result.t.tolist(), result.loss.tolist(), strict=True)
            ],
        }
