"""Parts of tools/bench/gpu.py beyond the step: system, save, noise, sampling, likelihood, features."""

import hashlib
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_dist import rng, snapshot, storage
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.diffusion import GaussianDiffusion, bits_per_dim, sample
from ddpm_dist.engine import init_world
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation.features import open_network
from ddpm_dist.evaluation.inception import FidInception
from ddpm_dist.recipe import dump_config
from ddpm_dist.sampling.worker import DTYPES, SampleWorker
from ddpm_dist.state import StateStore
from ddpm_dist.training import run_folder
from ddpm_dist.training.entry import finished
from ddpm_dist.training.loop import Training
from tools.bench.gpu_network import Ours, images, recipe
from tools.bench.gpu_sides import Process, Setting, alternate, apart, profiled, ratio, seconds_of

Row = dict[str, Any]


class System:
    """A whole training, loader, log and all, a step at a time."""

    def __init__(self, setting: Setting, batch: int, folder: str, *overrides: str) -> None:
        torch._dynamo.config.automatic_dynamic_shapes = False
        cfg = recipe(
            setting, batch, f"run.url=file://{folder}/run-{time.time_ns()}", f"data.url=file://{folder}/data",
            "train.steps=1000000", "checkpoint.every_steps=1000000", "checkpoint.snapshot_every_steps=1000000",
            *overrides,
        )  # fmt: skip
        world, token = init_world(cfg.cluster), run_folder.new_token()
        finished(cfg, token)
        self._training = _Gated(cfg, world, token)
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()
        self._training.came.acquire()

    def step(self) -> None:
        """Until the loop stands before its next step."""
        self._training.may.release()
        self._training.came.acquire()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._training.run()
        except BaseException as error:  # raised in `step`
            self._failure = error
        self._training.came.release()


class _Gated(Training):
    def __init__(self, *arguments: Any) -> None:
        self.may, self.came = threading.Semaphore(0), threading.Semaphore(0)
        super().__init__(*arguments)

    def _one_step(self, batch: Any) -> Any:
        self.came.release()
        self.may.acquire()
        return super()._one_step(batch)


def make_set(folder: str, count: int) -> None:
    """So many random images of 32×32 pixels in shards below the folder."""
    url, each = f"file://{folder}/data", 4096
    shards = []
    for first in range(0, count, each):
        numbers = torch.arange(first, min(first + each, count))
        pixels = rng.philox(1, 2, numbers, 3072)[:, :3072].remainder(256).to(torch.uint8).view(-1, 32, 32, 3).numpy()
        samples = [
            EncodedSample(f"{i:06d}", encode_png(image), "png")
            for i, image in zip(numbers.tolist(), pixels, strict=True)
        ]
        shards.append(write_shard(url, f"{first:06d}.tar", samples))
    write_index(url, shards)


def system(setting: Setting) -> Iterator[Row]:
    """The whole system, reading shards of PNGs from a disk, beside its bare step on images in memory."""
    with tempfile.TemporaryDirectory() as folder:
        make_set(folder, 20000 if not setting.small else 64)
        fast: tuple[str, ...] = ("model.channels_last=true", "model.compile=true") if setting.compiles else ()
        for batch in setting.batches(128, 512):
            for workers in (0, 4) if not setting.small else (0,):
                if setting.out_of_time:
                    yield {"images": batch, "data.workers": workers, "left out": "no time left"}
                    continue
                more = (*fast, f"data.workers={workers}", "logging.grid_images=0")
                with (
                    Process(System, setting, batch, folder, *more) as whole,
                    Process(Ours, setting, batch, *fast) as bare,
                ):
                    sides = {"bare": bare, "system": whole}
                    for side in sides.values():
                        side.ready()
                    found = alternate(sides, max(2, 8192 // batch) if not setting.small else 2, setting.times(7))
                    speeds = {f"{name}, images/s": batch / statistics.median(found[name]) for name in sides}
                    share = ratio(found, "system", "bare")
                    yield {"images": batch, "data.workers": workers, **speeds, "system / bare": share}


class Saving(Ours):
    """Steps with a state saved before one of them."""

    def __init__(self, setting: Setting, batch: int, folder: str) -> None:
        super().__init__(setting, batch, f"run.url=file://{folder}/run-{time.time_ns()}")
        self._device = setting.device
        self.store = StateStore(self.cfg, self.world)
        self.store.claim()
        self.store.prepare(self.engine, self.ema)

    def stalls(self, rounds: int) -> dict[str, float]:
        """Medians in seconds: a step; one with a save before it; what its background takes."""

        def timed(save: bool) -> float:
            def action() -> None:
                if save:
                    self.store.save(self.done, self.engine, self.ema, {"step": self.done})
                self.step()

            return seconds_of(action, self._device, 1, warm_up=0)

        found: dict[str, list[float]] = {"step": [], "saving": [], "background": []}
        for _ in range(rounds):
            self.step()
            found["step"].append(timed(False))
            found["saving"].append(timed(True))
            self.store.finish()
            found["background"].append(self.store.last_save_seconds)
        return {name: statistics.median(values) for name, values in found.items()}


def save(setting: Setting) -> Iterator[Row]:
    """What saving a state costs the step that follows it."""
    with tempfile.TemporaryDirectory() as folder:
        for batch in setting.batches(128, 512):
            with Process(Saving, setting, batch, folder) as process:
                process.ready()
                found = process.ask("stalls", setting.times(9))
            row: Row = {"images": batch, "step ms": 1e3 * found["step"], "with a save ms": 1e3 * found["saving"]}
            row["with / without"] = found["saving"] / found["step"]
            yield {**row, "background s": found["background"]}


def noise(setting: Setting) -> Iterator[Row]:
    """Our counter-based normal numbers, beside torch's own."""
    yield from apart(_noise, setting)


def _noise(setting: Setting) -> Iterator[Row]:
    device = torch.device(setting.device)
    for batch in setting.batches(16, 128, 512):
        numbers = torch.arange(batch, device=device)
        kinds = {
            "ours": partial(rng.normal, 1, 2, numbers, (3, 32, 32), 7),
            "torch.randn": partial(torch.randn, batch, 3, 32, 32, device=device),
        }
        for name, draw in kinds.items():
            row: Row = {"numbers": name, "images": batch}
            row["ms"] = 1e3 * seconds_of(draw, setting.device, setting.times(30))
            yield {**row, **profiled(draw, setting.device)}


class Sampler:
    """A sampling worker's network on a snapshot of the recipe's, recorded as a graph or not."""

    def __init__(self, setting: Setting, url: str) -> None:
        self._setting, self._url = setting, url
        gpus = 1 if setting.on_cuda else 0
        self._worker = SampleWorker(ClusterConfig(gpus_per_worker=gpus, wait_seconds=1))

    def step(self) -> None:
        """Nothing that repeats."""

    def images_per_second(self, settings: str, batch: int, graph: bool) -> float:
        sampling = SamplingConfig.model_validate_json(settings)
        network, diffusion = self._worker.network(self._url, sampling.precision)
        if not graph:
            unet = snapshot.load_snapshot(self._url)[0].to(self._worker.device, DTYPES[sampling.precision]).eval()

            def network(x: Any, t: Any, labels: Any) -> Any:
                return unet(x, t, labels).float()

        def make(steps: int | None) -> None:
            sample(
                network, diffusion, sampling.model_copy(update={"steps": steps}), seed=0, indices=torch.arange(batch),
                shape=(3, self._setting.size, self._setting.size), device=self._worker.device,
            )  # fmt: skip

        make(3)  # records, and loads what is loaded at first use
        return batch / seconds_of(lambda: make(sampling.steps), self._setting.device, 1, warm_up=0)

    def bits(self, batch: int) -> float:
        """Seconds of the likelihood of so many images."""
        network, diffusion = self._worker.network(self._url, "fp32")
        assert isinstance(diffusion, GaussianDiffusion)
        x_start = images(self._setting, batch).to(self._worker.device).float() / 127.5 - 1
        indices = torch.arange(batch, device=self._worker.device)
        return seconds_of(
            lambda: bits_per_dim(network, diffusion, x_start, seed=0, indices=indices), self._setting.device, 1, 0
        )


def _snapshot(setting: Setting, folder: str) -> str:
    cfg = recipe(setting, 16, *(("diffusion.timesteps=20",) if setting.small else ()))
    network, diffusion = snapshot.build(cfg)
    url = f"file://{folder}/snapshot"
    info = {"step": 0, "images_seen": 0, "kind": "ema", "config": dump_config(cfg)}
    snapshot.save_snapshot(url, network, network.config, diffusion, info)
    return url


def sampling(setting: Setting) -> Iterator[Row]:
    """Images a second: 15 steps and all 1,000, with the network recorded as a graph and without."""
    few = 15 if not setting.small else 5
    with tempfile.TemporaryDirectory() as folder:
        url = _snapshot(setting, folder)
        for sampler, steps, spacing in (("unipc", few, "log_snr"), ("ddpm", None, "uniform")):
            for precision in ("bf16", "fp32"):
                for batch in setting.batches(128, 512):
                    for graph in (True, False):
                        row: Row = {"sampler": sampler, "steps": steps or "all", "precision": precision}
                        row |= {"images": batch, "graph": "yes" if graph else "no"}
                        if setting.out_of_time:
                            yield {**row, "left out": "no time left"}
                            continue
                        told = SamplingConfig.model_validate(
                            {"sampler": sampler, "steps": steps, "spacing": spacing, "precision": precision}
                        )
                        with Process(Sampler, setting, url) as process:
                            speed = process.ask("images_per_second", told.model_dump_json(), batch, graph)
                        yield {**row, "images/s": speed}


def likelihood(setting: Setting) -> Iterator[Row]:
    """Bits/dim of a batch: 1,000 evaluations in float32."""
    with tempfile.TemporaryDirectory() as folder:
        url = _snapshot(setting, folder)
        for batch in setting.batches(64, 256):
            if setting.out_of_time:
                yield {"images": batch, "left out": "no time left"}
                continue
            with Process(Sampler, setting, url) as process:
                seconds = process.ask("bits", batch)
            yield {"images": batch, "seconds": seconds, "images/s": batch / seconds}


def features(setting: Setting) -> Iterator[Row]:
    """The feature networks of an evaluation."""
    yield from apart(_features, setting)


def _features(setting: Setting) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        buffer = io.BytesIO()
        torch.save(FidInception().state_dict(), buffer)
        path = Path(folder, "weights.pth")
        storage.publish(path.as_uri(), buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        batch = setting.batches(512)[0]
        pixels = images(setting, batch).cpu()
        for name, spec in (("lite0", "lite0"), ("inception", f"inception={path.as_uri()}#sha256={digest}")):
            try:
                network = open_network(spec, (3, 32, 32), setting.device)
            except EvaluationError as error:
                yield {"network": name, "left out": str(error)}
                continue
            seconds = seconds_of(partial(network, pixels), setting.device, setting.times(5))
            yield {"network": name, "images": batch, "images/s": batch / seconds}
