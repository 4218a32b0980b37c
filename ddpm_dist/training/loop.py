"""The training loop: one for both launchers.

An attempt claims the run's folder, resumes from the newest whole state, and steps until the last one. What
happens at a step is a function of (configuration, step), so an attempt can end anywhere.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster import Memory, restart_parts, tell
from ddpm_dist.config import Config
from ddpm_dist.data import Batch, Loader
from ddpm_dist.diffusion import QUARTILES, LossHistory, bins_of
from ddpm_dist.engine import Engine, World, broadcast_object, gather_tensor
from ddpm_dist.errors import PreemptedError
from ddpm_dist.progress import StepProgress
from ddpm_dist.recipe import dump_config
from ddpm_dist.state import StateStore
from ddpm_dist.training import run_folder
from ddpm_dist.training.branch import init_from
from ddpm_dist.training.control import Control
from ddpm_dist.training.copies import CopySteps
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.events import EventLog
from ddpm_dist.training.failures import SkippedSteps
from ddpm_dist.training.flops import Utilisation
from ddpm_dist.training.metrics import Goodput, PhaseClock, Window, memory_gib
from ddpm_dist.training.optim import lr_at
from ddpm_dist.training.publish import SnapshotPublisher
from ddpm_dist.training.step import BatchPlan, StepResult, training_step
from ddpm_dist.training.trace import StepTrace
from ddpm_dist.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Training:
    """One attempt of one rank: everything that lives as long as its process."""

    def __init__(
        self,
        cfg: Config,
        world: World,
        token: str,
        preempted: Callable[[], bool] = lambda: False,
        memory: Memory | None = None,
    ) -> None:
        """token: names the job. preempted: whether this rank's node was announced to go away. memory: outlives it."""
        self.cfg, self.world = cfg, world
        self._preempted = preempted
        self._asked_to_stop = False
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)  # what all ranks would say, rank 0 says
        self.plan = BatchPlan.of(cfg.train.global_batch, world.size, cfg.train.max_micro_batch)
        if world.is_first and (advice := self.plan.advice(world.size, cfg.train.max_micro_batch)):
            log.warning("%s", advice)
        self.watchdog = Watchdog(cfg.cluster.hang_seconds)
        last_sign = run_folder.last_sign_of_life(cfg.run.url) if world.is_first else None  # the account is rank 0's
        self.store = StateStore(cfg, world, partial(run_folder.steps_to_keep, cfg), memory)
        owner = self.store.check_owner  # asked before all that is published: a void attempt leaves the folder alone
        self.lease = run_folder.Lease(cfg.run.url, token, owner) if world.rank == 0 else None
        network, self.diffusion = snapshot.build(cfg)
        self.engine = Engine(network, cfg, world, self.plan.micro_batch, self.plan.accumulation)
        tell("engine")
        self.ema = Ema(self.engine.pieces(), cfg)
        learns_t = cfg.diffusion.t_sampling == "loss_second_moment"
        self.history = LossHistory.of(self.diffusion) if learns_t else None
        self.loader = Loader(cfg, world.rank, world.size, pinned=world.device.type == "cuda")
        self.goodput = Goodput()
        self.control = Control(world)
        self.skipped = SkippedSteps(cfg, world, owner)
        self.window = Window(0)
        self.store.prepare(self.engine, self.ema)
        self.copies = CopySteps(cfg, self.store)
        self.step = self._resume(last_sign)
        """Optimizer steps done."""
        tell("state")
        self.events = EventLog(cfg.run.url, self.store.attempt, self.step) if world.rank == 0 else None
        self.progress = StepProgress(self.step, cfg.train.steps, cfg.train.global_batch) if world.rank == 0 else None
        self.publisher = SnapshotPublisher(cfg, world, self.diffusion, self.events, owner)
        self.clock = PhaseClock(on_cuda=world.device.type == "cuda")
        self._utilisation = Utilisation(cfg, world.size)
        self.trace = StepTrace(cfg, world, owner)

    def ask_to_stop(self) -> None:
        """All ranks save and leave after the next step but one; may be called from a signal handler."""
        self._asked_to_stop = True

    def run(self) -> None:
        """Steps until the last one, or until somebody asks to stop; the state is saved in both cases."""
        cfg = self.cfg
        if self.events is not None:
            self.events.text("config", f"```yaml\n{dump_config(cfg)}```", self.step)
        self._publish_missing_snapshot()
        batches = self.loader.batches(self.step)
        stopping = preempted = False
        while self.step < cfg.train.steps and not (stopping or preempted):
            with self.clock.phase("data"):
                batch = next(batches)
            tell("first_batch")
            with self.trace.around(self.step):
                result = self._one_step(batch)
            stopping, preempted = self._exchange(batch, result)
            self.step += 1
            if tell("first_step") and self.events is not None:
                self.events.scalars(restart_parts(), self.step)
            self._publish(save_now=stopping or preempted)
            if self.step % cfg.logging.every_steps == 0 or self.step == cfg.train.steps or stopping or preempted:
                self._log(result)
            self.watchdog.beat()
        if preempted and not stopping and self.step < cfg.train.steps:
            self.publisher.close()
            self.store.finish()
            raise PreemptedError(f"a node is about to be taken away; the state of step {self.step} is saved")
        if stopping:
            log.info("stopped at step %d, as asked; the same command continues", self.step)

    def close(self, ended_well: bool) -> None:
        """Waits for everything in the background; after an error, only ends it."""
        self.watchdog.stop()
        self.loader.close()
        if ended_well:
            self.publisher.close()
            self.store.finish()
            if self.world.rank == 0:
                self.store.check_owner()
                run_folder.write_summary(self.cfg.run.url, self._summary())
        if self.progress is not None:
            self.progress.close()
        if self.events is not None:
            self.events.close()
        if self.lease is not None:
            self.lease.release()

    def _resume(self, last_sign_at: float | None) -> int:
        """Loads the newest whole state, if there is one, and returns its step."""
        start = time.perf_counter()
        state = self.store.claim()
        if state is None:
            if self.cfg.run.init_from is not None:
                init_from(self.cfg.run.init_from, self.cfg, self.world, self.engine, self.ema)
            log.info("a new run begins at step 0: %s", self.cfg.run.url)
            self.goodput.began_at = self.store.began_at
            if self.store.attempt > 1:
                self.goodput.resume(self.store.began_at, last_sign_at, self.store.attempt - 1)
            return 0
        meta = self.store.load(state, self.engine, self.ema)
        self.goodput = Goodput(**meta["goodput"])
        self.goodput.resume(meta["saved_at"], last_sign_at, self.store.attempt - 1)
        self.skipped.total = meta["skipped_steps"]
        self.ema.clock = meta.get("ema_clock", 0)
        if self.history is not None and meta["loss_history"] is not None:
            exact = {name: torch.tensor(v, dtype=torch.float64) for name, v in meta["loss_history"].items()}
            self.history.load_state_dict(exact)
        step = int(meta["step"])
        self.window = Window(step, meta.get("bad_samples", 0))
        log.info(
            "continuing at step %d (%s images, epoch %d) as attempt %d; the state was read in %.1f s%s",
            step, f"{step * self.cfg.train.global_batch:,}", self.loader.epoch(step), self.store.attempt,
            time.perf_counter() - start, " from memory" if self.store.recalled else "",
        )  # fmt: skip
        return step

    def _one_step(self, batch: Batch) -> StepResult:
        result = training_step(
            self.engine, self.diffusion, batch.images, batch.labels, self.step, self.cfg, self.world, self.plan,
            self.clock, self.history,
        )  # fmt: skip
        self.skipped.see(self.step, batch, result)
        if result.report.applied:
            with self.clock.phase("ema"):
                self.ema.update(self.step, self.cfg.train.global_batch)
        if self.history is not None:
            bins = bins_of(self.diffusion, self.cfg.diffusion, result.t, len(self.history.counts))
            self.history.update(gather_tensor(self.world, bins), gather_tensor(self.world, result.loss))
        return result

    def _exchange(self, batch: Batch, result: StepResult) -> tuple[bool, bool]:
        """Hears of the last step, tells of this one; whether all ranks are to save and leave now: as asked, or as
        some node is about to be taken away."""
        heard = self.control.hear()
        stop = self._asked_to_stop or (self.lease is not None and self.lease.stop_requested)
        bad = sum(batch.bad.values())
        quarter = bins_of(self.diffusion, self.cfg.diffusion, result.t, QUARTILES)
        saving = self._save_due(self.step + 1) or (heard is not None and (heard.stop or heard.preempted))
        full = self.copies.plan(self.step + 1, saving, heard is not None and heard.full)
        self.control.tell(result.loss, quarter, bad, stop, self._preempted(), full)
        if self.lease is not None:
            self.lease.step = self.step
        if heard is None:
            return False, False
        self.window.add(heard)
        return heard.stop, heard.preempted

    def _publish_missing_snapshot(self) -> None:
        """The snapshot of the step that was resumed from, if a kill came between its state and itself."""
        missing = self.world.is_first and not run_folder.has_snapshot(self.cfg.run.url, self.step)
        if self._snapshot_due() and broadcast_object(self.world, missing):
            self.publisher.publish(self.ema, self.engine, self.step)

    def _snapshot_due(self) -> bool:
        step = self.step
        return step > 0 and (step % self.cfg.checkpoint.snapshot_every_steps == 0 or step == self.cfg.train.steps)

    def _publish(self, save_now: bool) -> None:
        """Snapshot and state, where they are due; a state in any case if `save_now`."""
        step = self.step
        if self.lease is not None:
            self.lease.poll()
        if self._snapshot_due():
            with self.clock.phase("snapshot"):
                self.publisher.publish(self.ema, self.engine, step)
        if self._save_due(step) or save_now:
            with self.clock.phase("checkpoint"):
                self.store.save(step, self.engine, self.ema, self._meta())
        elif self.copies.now:
            with self.clock.phase("checkpoint"):
                self.store.keep(step, self.engine, self.ema, self._meta())

    def _save_due(self, step: int) -> bool:
        return step % self.cfg.checkpoint.every_steps == 0 or step == self.cfg.train.steps

    def _meta(self) -> dict[str, Any]:
        """What the state holds beside tensors; never a generator's state (contract 2)."""
        history = self.history.state_dict() if self.history is not None else None
        return {
            "step": self.step,
            "images_seen": self.step * self.cfg.train.global_batch,
            "epoch": self.loader.epoch(self.step),
            "data": self.loader.content_id,
            "goodput": asdict(self.goodput.plus(self.clock.read())),
            "loss_history": history and {name: values.tolist() for name, values in history.items()},
            "skipped_steps": self.skipped.total,
            "bad_samples": self.window.bad_samples,
            **({"ema_clock": self.ema.clock} if self.ema.clock else {}),
        }

    def _log(self, result: StepResult) -> None:
        """Scalars and a progress line over the steps since the last ones."""
        self.store.poll()
        phases = self.clock.take()
        self.goodput.add(phases)
        steps, means = self.window.take(self.step)
        seconds = sum(phases.values())
        images_per_second = steps * self.cfg.train.global_batch / seconds
        if self.events is None or self.progress is None:
            return
        self.events.scalars(
            {
                **means,
                "optimisation/lr": lr_at(self.cfg.train, self.step - 1),
                "optimisation/grad_norm": result.report.grad_norm,
                "optimisation/loss_scale": result.report.loss_scale,
                "optimisation/skipped_steps": self.skipped.total,
                "data/bad_samples": self.window.bad_samples,
                "speed/images_per_second": images_per_second,
                "speed/data_wait_fraction": phases["data"] / seconds,
                **{f"seconds_per_step/{name}": value / steps for name, value in phases.items()},
                **{f"goodput/{name}": share for name, share in self.goodput.shares().items()},
                "progress/restarts": self.goodput.restarts,
                "checkpoint/background_seconds": self.store.last_save_seconds,
                "checkpoint/stall_seconds": phases["checkpoint"],
                "checkpoint/failed_saves": self.store.failed_saves,
                "checkpoint/skipped_copies": self.copies.skipped,
                "progress/images_seen": self.step * self.cfg.train.global_batch,
                "progress/epoch": self.loader.epoch(self.step),
                **memory_gib(self.world.device),
                **self._utilisation.scalars(images_per_second),
            },
            self.step,
        )
        self.progress.show(self.step, means.get("loss/mean"), images_per_second, phases["data"] / seconds)

    def _summary(self) -> dict[str, Any]:
        """What run.url/summary.json says about the run as a whole."""
        cfg, spent = self.cfg, self.goodput
        training_s = spent.productive_s + spent.data_wait_s + spent.checkpoint_s + spent.snapshot_s
        images = self.step * cfg.train.global_batch
        return {
            "step": self.step,
            "steps": cfg.train.steps,
            "images_seen": images,
            "images_per_second": images / training_s if training_s else 0.0,
            "data_wait_fraction": spent.data_wait_s / training_s if training_s else 0.0,
            "goodput": spent.shares(),
            "restarts": spent.restarts,
            "skipped_steps": self.skipped.total,
            "bad_samples": self.window.bad_samples,
            "workers": self.world.size,
            "tensorboard": storage.join(cfg.run.url, "tensorboard"),
            "snapshot": run_folder.newest_snapshot(cfg.run.url),
        }
