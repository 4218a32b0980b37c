"""Recorded graphs of the network in sampling, and how many images a worker takes at once."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist import device as devices, snapshot
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.engine.world import World
from ddpm_dist.errors import SamplingError
from ddpm_dist.recipe import dump_config, parse_config
from ddpm_dist.sampling import worker as workers
from ddpm_dist.sampling.capture import captured
from ddpm_dist.sampling.worker import ProbeTask, SampleWorker
from tests.cuda.ranks import Ranks
from tests.sampling.test_plan import manifest as any_manifest
from tests.sampling.tiny import make_snapshot


def inputs(world: World, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    t = torch.randint(20, (batch,), generator=generator)
    labels = torch.randint(3, (batch,), generator=generator)
    return x.to(world.device), t.to(world.device), labels.to(world.device)


@torch.no_grad()
def graph_against_eager(world: World, url: str, beside: bool) -> list[bool]:
    """Whether each answer of the recorded network is the eager one's, with work of another thread beside."""
    unet, _ = snapshot.load_snapshot(url)
    unet = unet.to(world.device).eval()
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            torch.ones(1000, device=world.device).cpu()

    thread = threading.Thread(target=disturb)
    if beside:
        thread.start()
    try:
        recorded = captured(unet, world.device)
        found = []
        for seed in range(6):
            x, t, labels = inputs(world, 2 if seed % 3 else 5, seed)
            found.append(torch.equal(recorded(x, t, labels), unet(x, t, labels)))
    finally:
        ended.set()
        if beside:
            thread.join()
    return found


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
def test_a_recorded_network_answers_as_the_eager_one(alone: Ranks, tmp_path: Path, beside: bool) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=3)
    (found,) = alone(graph_against_eager, url, beside)
    assert all(found), found


def evicted(world: World, urls: list[str]) -> list[int]:
    """Bytes that torch holds of the device after each of many snapshots was sampled from."""
    worker = SampleWorker(_cluster(world))
    held = []
    for url in urls:
        network, _ = worker.network(url, "fp32")
        x, t, labels = inputs(world, 8, 0)
        network(x, t, labels)
        del network
        devices.let_go(world.device)
        held.append(torch.cuda.memory_reserved(world.device) if world.device.type == "cuda" else 0)
    del worker
    return held


def test_snapshots_that_were_left_give_their_memory_back(alone: Ranks, tmp_path: Path) -> None:
    urls = [make_snapshot(f"file://{tmp_path}/{seed}", num_classes=3, seed=seed) for seed in range(6)]
    (held,) = alone(evicted, urls)
    assert held[-1] <= held[2], held


def probe(world: World, url: str, gigabytes: float, sampling: dict[str, Any]) -> tuple[int, int, float]:
    """(batch size; images made with it; share of the allowed memory that this took) on so small a device."""
    on_cuda = world.device.type == "cuda"
    total = torch.cuda.mem_get_info(world.device)[1] if on_cuda else 2**40
    worker = SampleWorker(_cluster(world))
    settings, count = SamplingConfig(**sampling), 256 if on_cuda else 8
    devices.let_go(world.device)
    used = torch.cuda.memory_reserved(world.device) if on_cuda else 0
    if on_cuda:
        torch.cuda.set_per_process_memory_fraction((gigabytes * 2**30 + used) / total, world.device)
    try:
        answer = worker(ProbeTask(url, settings.model_dump_json(), count))
        manifest = any_manifest(
            snapshot=url, num_classes=3, labels="random", num_samples=count, fingerprint=worker.fingerprint(),
            sampling=settings.model_copy(update={"batch_size": answer.batch_size}), image_size=32, channels=3,
        )  # fmt: skip
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(world.device)
        images, _ = worker.images(manifest, manifest.units[0])
        taken = torch.cuda.max_memory_reserved(world.device) - used if on_cuda else 0
        return answer.batch_size, len(images), taken / (gigabytes * 2**30)
    finally:
        if on_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, world.device)


def wide_snapshot(url: str) -> str:
    """Of a network whose activations take some two megabytes for an image."""
    cfg = parse_config(
        f"""
        run: {{url: {url}}}
        data: {{url: {url}-data, image_size: 32}}
        model: {{channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [16], num_classes: 3}}
        diffusion: {{timesteps: 20}}
        train: {{steps: 10, global_batch: 4}}
        """
    )
    network, diffusion = snapshot.build(cfg)
    info = {"step": 10, "images_seen": 40, "kind": "ema", "config": dump_config(cfg)}
    snapshot.save_snapshot(url, network, network.config, diffusion, info)
    return url


def _cluster(world: World) -> ClusterConfig:
    return ClusterConfig(gpus_per_worker=1 if world.device.type == "cuda" else 0, wait_seconds=0.1)


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "ddpm", "steps": 3},
        {"sampler": "heun", "steps": 3, "guidance_scale": 2.0, "guidance_interval": (0, 5)},
        {"sampler": "dpmpp_2m", "steps": 4, "clip": "dynamic", "precision": "bf16"},
    ],
    ids=["ddpm", "guided heun", "dynamic clipping"],
)
def test_the_batch_that_was_found_fits(alone: Ranks, device: str, tmp_path: Path, sampling: dict[str, Any]) -> None:
    url = wide_snapshot(f"file://{tmp_path}/snapshot")
    ((roomy, made, _),) = alone(probe, url, 8.0, sampling)
    assert 1 <= roomy <= workers.MAX_BATCH
    if device == "cuda":
        assert made == 256
        ((small, made, share),) = alone(probe, url, 0.4, sampling)
        assert made == 256
        assert 1 <= small <= roomy
        assert share <= 1.0


def too_small(world: World, url: str) -> str:
    """The message where not one image fits."""
    worker = SampleWorker(_cluster(world))

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    task = ProbeTask(url, SamplingConfig().model_dump_json(), 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "trajectory", refuse)
        with pytest.raises(SamplingError) as error:
            worker(task)
    return str(error.value)


def test_where_not_one_image_fits_it_is_said(alone: Ranks, tmp_path: Path) -> None:
    (said,) = alone(too_small, make_snapshot(f"file://{tmp_path}/snapshot"))
    assert "not one image fits" in said
