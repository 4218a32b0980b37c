"""Small evaluations for tests: sets, networks, runs, and a pool in this process."""

import io
import json

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster.pool import Done
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.stream import iterate
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.evaluation import job
from ddpm_dist.evaluation.order import Order
from ddpm_dist.evaluation.worker import EvaluationWorker
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.run_folder import snapshot_url
from tests.sampling.tiny import make_snapshot

CLUSTER = ClusterConfig(wait_seconds=240)
PIXEL = ("frechet_pixel",)


class InProcess:
    """Stands in for the pool: three workers in this process, each task at another one, the last tasks first."""

    def __init__(self) -> None:
        self.workers = [EvaluationWorker(ClusterConfig()) for _ in range(3)]
        self.alive = 3
        self.tasks: list[object] = []

    def map(self, tasks):  # type: ignore[no-untyped-def]
        for number, task in enumerate(reversed(list(tasks))):
            self.tasks.append(task)
            yield Done(task, self.workers[number % 3](task))


def evaluate(order: Order, pool: InProcess | None = None) -> dict[str, object]:
    return job.evaluate(order, pool or InProcess(), 3, CLUSTER)  # type: ignore[arg-type]


def pictures(count: int, seed: int, size: int = 8) -> Tensor:
    """[N, 1, H, W] uint8: blobs, so that their distances are neither 0 nor those of noise."""
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return (128 + 100 * smooth + 5 * seed).clamp(0, 255).to(torch.uint8)


def make_set(url: str, images: Tensor, per_shard: int = 37) -> str:
    shards = []
    for start in range(0, len(images), per_shard):
        part = images[start : start + per_shard].permute(0, 2, 3, 1).numpy()
        encoded = [EncodedSample(f"{start + i:06d}", encode_png(image), "png") for i, image in enumerate(part)]
        shards.append(write_shard(url, f"shard-{start:06d}.tar", encoded))
    write_index(url, shards)
    return url


def as_features(url: str) -> Tensor:
    images = np.stack([sample.image for sample in iterate(url, channels=3)])
    return torch.from_numpy(images).flatten(1).double() / 255


def save_npz(url: str, **arrays: object) -> str:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    storage.publish(url, buffer.getvalue())
    return url


def script_network(url: str, factor: float = 1.0) -> str:
    """A TorchScript network of 12 features."""

    class Means(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) * self.factor

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Means(factor)), buffer)
    storage.publish(url, buffer.getvalue())
    return url


def run_config(url: str, data: str, **evaluation: object):  # type: ignore[no-untyped-def]
    return parse_config(
        f"""
        run: {{url: {url}}}
        data: {{url: {data}, image_size: 8, channels: 1}}
        model: {{channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], norm_groups: 4}}
        diffusion: {{timesteps: 20}}
        train: {{steps: 30, global_batch: 4}}
        sampling: {{sampler: ddim, steps: 4, unit_size: 8, batch_size: 4}}
        evaluation: {json.dumps({"metrics": ["frechet_pixel"], "num_samples": 16, **evaluation})}
        """
    )


def publish_snapshot(run_url: str, step: int) -> None:
    url = make_snapshot(f"{run_url}/made", seed=step)
    network, diffusion = snapshot.load_snapshot(url)
    info = {**snapshot.load_info(url), "step": step}
    snapshot.save_snapshot(snapshot_url(run_url, step), network, network.config, diffusion, info)
