"""Snapshots while training: EMA weights to the run's folder in the background, and a grid of samples.

The ranks gather the weights and share the sampling of the grid; then training goes on while rank 0 uploads.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist import snapshot, storage
from ddpm_dist.config import Config
from ddpm_dist.diffusion import Network, Process, sample
from ddpm_dist.engine import Engine, World
from ddpm_dist.recipe import dump_config
from ddpm_dist.training import run_folder
from ddpm_dist.training.ema import MAIN, Ema
from ddpm_dist.training.events import EventLog, image_grid

log = logging.getLogger(__name__)


class SnapshotPublisher:
    """Publishes one snapshot at a time; errors of the background upload are raised at the next call."""

    def __init__(
        self,
        cfg: Config,
        world: World,
        diffusion: Process,
        events: EventLog | None,
        check_owner: Callable[[], None],
    ) -> None:
        """check_owner: raises if this attempt may publish nothing more."""
        self._cfg, self._world, self._events, self._check_owner = cfg, world, events, check_owner
        self._network, self._diffusion = snapshot.network_of(cfg), diffusion
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None

    def publish(self, ema: Ema, engine: Engine, step: int) -> None:
        """step: optimizer steps done. All ranks call it; it returns when weights are gathered and the grid is drawn.

        Neither needs room for another network on a GPU: rank 0 gathers to host memory, and the engine draws the grid
        with the average in its weights' place.
        """
        self.wait()
        averages = {label: ema.gather(self._world, engine.shapes, label, everywhere=False) for label in ema.averages}
        if self._cfg.logging.grid_images:
            with ema.computing(engine), engine.evaluating():
                images = self._sample_grid(engine)
            if self._events is not None:
                self._events.image("samples/ema", image_grid(images), step)
        if self._world.is_first:
            self._pending = self._pool.submit(self._upload, averages, step, ema.clock)

    def wait(self) -> None:
        """Until the last snapshot is whole; raises what its upload raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

    def _upload(self, averages: dict[str, dict[str, Tensor]], step: int, clock: int) -> None:
        """The snapshot, and beside it one of each power average (for ddpm-posthoc-ema)."""
        cfg = self._cfg
        for label, weights in averages.items():
            info = {
                "kind": label,
                "step": step,
                "images_seen": step * cfg.train.global_batch,
                "config": dump_config(cfg),
                **({"ema_steps": step + clock} if clock else {}),  # a branch's averages are older than it
            }
            url = run_folder.snapshot_url(cfg.run.url, step)
            if label != MAIN:
                url = storage.join(cfg.run.url, "averages", label, f"{step:09d}")
            snapshot.save_snapshot(url, weights, self._network, self._diffusion, info, self._check_owner)
            log.info("snapshot of step %d: %s", step, url)

    def _sample_grid(self, network: Network) -> Tensor:
        """[grid_images, C, H, W] uint8 on all ranks; image i has the noise of index i."""
        cfg, world = self._cfg, self._world
        each = -(-cfg.logging.grid_images // world.size)
        indices = torch.arange(world.rank * each, (world.rank + 1) * each)
        labels = indices % cfg.model.num_classes if cfg.model.num_classes else None
        steps = cfg.logging.grid_steps
        update: dict[str, Any] = {"sampler": "ddim", "steps": steps, "eta": None, "churn": 0.0}
        if cfg.sampling.guide is not None:
            update |= {"guide": None, "guidance_scale": 1.0}
        if self._diffusion.discrete:
            update |= {"steps": min(steps, cfg.diffusion.timesteps), "spacing": "uniform"}
        settings = cfg.sampling.model_copy(update=update)
        images = sample(
            network,
            self._diffusion,
            settings,
            seed=cfg.run.seed,
            indices=indices,
            shape=(cfg.data.channels, cfg.data.image_size, cfg.data.image_size),
            labels=labels,
            null_label=cfg.model.num_classes,
            device=world.device,
        )
        images = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if world.size > 1:
            parts = [torch.empty_like(images) for _ in range(world.size)]
            dist.all_gather(parts, images)
            images = torch.cat(parts)
        return images[: cfg.logging.grid_images].cpu()
