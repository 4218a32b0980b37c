"""The whole training loop in real ranks (gloo, DeepSpeed, the store), with faults put where a test wants them.

Ranks come from the fork server of `tests/engine/worker_group.py`, so an attempt costs a second, not ten.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_dist import cli, storage
from ddpm_dist.cluster import rank
from ddpm_dist.cluster.memory import Memory
from ddpm_dist.config import Config
from ddpm_dist.data.loader import Batch
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World
from ddpm_dist.recipe import dump_config, load_config
from ddpm_dist.state import format as fmt, history, writer
from ddpm_dist.state.copies import Copies
from ddpm_dist.state.reader import Target, read_into, read_manifest
from ddpm_dist.state.writer import StateWriter
from ddpm_dist.storage import multipart, objects, once
from ddpm_dist.training import run_folder
from ddpm_dist.training.entry import deepspeed_worker, ray_worker
from ddpm_dist.training.failures import SkippedSteps
from ddpm_dist.training.step import StepResult
from tests.engine import worker_group as group

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.channels=16", "model.channel_mult=[1,2]", "model.num_res_blocks=1", "model.norm_groups=8",
    "model.attention_resolutions=[4]", "model.scale_shift=false", "model.dropout=0.1", "data.flip=true",
    "train.global_batch=16", "train.max_micro_batch=4", "train.warmup_steps=3", "logging.every_steps=5",
    "logging.grid_images=0", "checkpoint.every_steps=2", "checkpoint.snapshot_every_steps=1000",
    "cluster.hang_seconds=60",
)  # fmt: skip
"""digits.yaml made tiny: dropout, flips, and two micro-batches a step with two ranks."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong in an attempt. None of it by default."""

    die: tuple[int, int, int] | None = None
    """(rank, step, backward pass): SIGKILL there, in the middle of the step."""
    die_after_state: int | None = None
    """... but not before the state of this step is whole."""
    die_at_change: tuple[int, int, bool] | None = None
    """(rank, number, after): SIGKILL at this rank's so-manieth change of what is below `checkpoints/`."""
    nan_at: tuple[int, ...] = ()
    """Steps in which the last rank's loss isn't a number."""
    record: str | None = None
    """Folder in which each rank leaves its log, and a line for each step and each change of `checkpoints/`."""
    die_in_copy: tuple[int, int, str] | None = None
    """(rank, step, where): SIGKILL in the first copy from that step on: "half" made, "whole", or "committed", too."""
    memory: tuple[str, ...] = ()
    """Paths of what outlives each rank; then it runs as under a supervisor."""
    agreed: int | None = None
    """Step of the copy there that all ranks have."""
    small_parts: bool = False
    """States are cut into files of 6 MiB, and these into upload parts of 5 MiB, the least that S3 allows."""


def config(run_url: str, data_url: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs/digits.yaml", [f"run.url={run_url}", f"data.url={data_url}", *TINY, *overrides])


def attempt(cfg: Config, size: int, faults: Faults = Faults()) -> list[str | None]:
    """Runs the training in `size` ranks until it ends or a rank dies: for each its error, or what it wrote, or None."""
    return group.start_ranks(_rank, size, cfg, faults)


def finish(cfg: Config, size: int, faults: Faults = Faults()) -> str:
    """Runs it to its end; a hash of the last state."""
    group.run_ranks(_rank, size, cfg, faults)
    return fingerprint(cfg.run.url)


def newest_state(run_url: str) -> tuple[fmt.Manifest, dict[tuple[str, str], torch.Tensor]]:
    """(manifest, {(kind, parameter): 1-D tensor}) of the newest valid state."""
    folder = storage.join(run_url, "checkpoints")
    url = storage.join(folder, str(history.read(folder)[1][0]))
    manifest = read_manifest(url)
    targets = [
        Target(kind, name, 0, torch.empty(math.prod(shape)))
        for kind in sorted(manifest.kinds)
        for name, shape in sorted(manifest.shapes.items())
    ]
    read_into(url, manifest, targets)
    return manifest, {(target.kind, target.name): target.tensor for target in targets}


def fingerprint(run_url: str) -> str:
    """SHA-256 of the weights, moments, averages and scalars of the newest state."""
    manifest, tensors = newest_state(run_url)
    digest = hashlib.sha256(json.dumps([manifest.id.step, manifest.scalars], sort_keys=True).encode())
    for (kind, name), tensor in tensors.items():
        digest.update(f"{kind} {name}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def steps_of(record: Path) -> dict[int, dict[str, Any]]:
    """{step: {"keys", "t" and "losses" of the global batch, "loss": their mean, "grad_norm", "world": ranks}}.

    Of the last attempt that did each step.
    """
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for path in sorted(record.glob("steps-*")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            of_step = found.setdefault(entry["step"], {})
            if of_step and next(iter(of_step.values()))["attempt"] < entry["attempt"]:
                of_step.clear()  # the same step again, after a resume
            if not of_step or next(iter(of_step.values()))["attempt"] == entry["attempt"]:
                of_step[entry["rank"]] = entry
    whole = {}
    for step, ranks in found.items():
        entries = [ranks[rank] for rank in sorted(ranks)]
        batch = {kind: [value for entry in entries for value in entry[kind]] for kind in ("keys", "t", "losses")}
        loss = sum(batch["losses"]) / len(batch["losses"])
        whole[step] = {**batch, "loss": loss, "grad_norm": entries[0]["grad_norm"], "world": entries[0]["world"]}
    return whole


# In the ranks


def _rank(world: World, cfg: Config, faults: Faults) -> None:
    cli.setup_logging()
    install(world, cfg.run.url, faults)
    if faults.memory:
        rank._memory = Memory(os.open(faults.memory[world.rank], os.O_RDWR), faults.agreed)
        ray_worker({"config": dump_config(cfg)}, run_folder.new_token(), lambda: False)
    else:
        deepspeed_worker(cfg)


def install(world: World, run_url: str, faults: Faults) -> None:
    """Puts the faults in place, in this process, for good."""
    if faults.die is not None and faults.die[0] == world.rank:
        _die_in_backward(*faults.die[1:], run_url, faults.die_after_state or 0)
    if faults.die_in_copy is not None and faults.die_in_copy[0] == world.rank:
        _die_in_copy(*faults.die_in_copy[1:])
    if faults.nan_at and world.rank == world.size - 1:
        _spoil(faults.nan_at)
    if faults.record is not None:
        _record_steps(world, Path(faults.record))
        logging.getLogger().addHandler(logging.FileHandler(Path(faults.record) / f"log-{world.rank}"))
    if faults.small_parts:
        multipart.PART_BYTES, fmt.FILE_BYTES = 5 << 20, 6 << 20
    if faults.record is not None or faults.die_at_change is not None:
        _watch_changes(world, faults)


def _die_in_backward(step: int, number: int, run_url: str, after_state: int) -> None:
    backward = Engine.backward
    passes = [0]

    def dying(self: Engine, loss: Any) -> None:
        done = self.scalars()["optimizer_steps"]
        passes[0] = passes[0] + 1 if done == step else 0
        if passes[0] > number:
            while (history.latest_step(run_url) or 0) < after_state:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        backward(self, loss)

    Engine.backward = dying  # type: ignore[method-assign]


def _die_in_copy(step: int, where: str) -> None:
    copy, to_host, commit = StateWriter._copy, writer._copy_to_host, Copies.commit
    here = [False]

    def marked(self: StateWriter, of_step: int, *arguments: Any) -> Any:
        here[0] = of_step >= step
        return copy(self, of_step, *arguments)

    def half(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
        if here[0] and where == "half":
            to_host(buffer, tensors[: len(tensors) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return to_host(buffer, tensors)

    def committed(self: Copies, *arguments: Any) -> None:
        if not here[0] or where == "committed":
            commit(self, *arguments)
        if here[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    StateWriter._copy, writer._copy_to_host, Copies.commit = marked, half, committed  # type: ignore[method-assign]


def _spoil(steps: Sequence[int]) -> None:
    """NaN in the loss of the given attempts of a step, counted from 0 in this process."""
    backward, step = Engine.backward, Engine.step
    count = [0]

    def spoilt(self: Engine, loss: Any) -> None:
        backward(self, loss * float("nan") if count[0] in steps else loss)

    def counted(self: Engine, lr: float) -> Any:
        count[0] += 1
        return step(self, lr)

    Engine.backward, Engine.step = spoilt, counted  # type: ignore[method-assign]


def _record_steps(world: World, folder: Path) -> None:
    see = SkippedSteps.see
    attempt = max([int(path.stem.split("-")[1]) for path in folder.glob("steps-*")], default=0)
    if world.size > 1:
        import torch.distributed as dist

        dist.barrier()
    path = folder / f"steps-{attempt + 1}-{world.rank}.jsonl"

    def recording(self: SkippedSteps, step: int, batch: Batch, result: StepResult) -> None:
        entry = {
            "attempt": attempt, "rank": world.rank, "world": world.size, "step": step, "keys": batch.keys,
            "losses": result.loss.tolist(), "t": result.t.tolist(), "applied": result.report.applied,
            "grad_norm": result.report.grad_norm,
        }  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        see(self, step, batch, result)

    SkippedSteps.see = recording  # type: ignore[method-assign]


class _Watched:
    """A filesystem that tells of each change below `checkpoints/`, and lets the process die at one of them."""

    def __init__(self, fs: Any, change: Callable[[str, Callable[[], Any]], Any]) -> None:
        self._fs, self._change = fs, change

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name not in ("pipe_file", "rm_file", "rm", "call_s3"):
            return found

        def called(first: Any, *arguments: Any, **options: Any) -> Any:
            about = first
            if name == "call_s3":
                removed = options.get("Delete", {}).get("Objects", [{}])
                about = options.get("Key") or removed[0].get("Key", "")
            if "checkpoints/" not in str(about) or first in ("list_parts", "head_object", "get_object"):
                return found(first, *arguments, **options)
            what = f"{first if name == 'call_s3' else name} {str(about).split('checkpoints/')[1]}"
            return self._change(what, lambda: found(first, *arguments, **options))

        return called


def _watch_changes(world: World, faults: Faults) -> None:
    """Every change of the store that a save, a claim or retention makes goes through here: each upload part, too."""
    filesystem = objects.filesystem
    dying_rank, number, after = faults.die_at_change or (-1, 0, False)
    log = Path(faults.record) / f"changes-{world.rank}" if faults.record is not None else None
    done = [0]

    def change(what: str, action: Callable[[], Any]) -> Any:
        at, done[0] = done[0], done[0] + 1
        if log is not None:
            with log.open("a") as file:
                file.write(f"{what}\n")
        if world.rank != dying_rank or at != number:
            return action()
        if after:
            with contextlib.suppress(Exception):  # of a refusal, too, one may not hear any more
                action()
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(url: str) -> tuple[Any, str]:
        fs, path = filesystem(url)
        return _Watched(fs, change), path

    objects.filesystem = once.filesystem = watched
