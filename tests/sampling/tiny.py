"""A snapshot small enough to sample from in milliseconds, and what a folder of samples holds."""

import hashlib
import json
import os
import time

import torch
from torch import Tensor

from ddpm_dist import snapshot, storage
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.recipe import dump_config, parse_config
from ddpm_dist.sampling.job import Order
from ddpm_dist.sampling.plan import Manifest, Unit
from ddpm_dist.sampling.worker import SampleWorker

SETTINGS = SamplingConfig(sampler="ddim", steps=4, unit_size=8, batch_size=4)


def make_snapshot(
    url: str, num_classes: int | None = None, seed: int = 0, kind: str = "ema", process: str = "ddpm"
) -> str:
    """Publishes a random network for 8×8 grey images whose output depends on x, t and the class."""
    cfg = parse_config(
        f"""
        run: {{url: {url}, seed: {seed}}}
        data: {{url: {url}-data, image_size: 8, channels: 1}}
        model: {{channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], norm_groups: 4,
                 num_classes: {"null" if num_classes is None else num_classes}}}
        diffusion: {{process: {process}{", timesteps: 20" if process == "ddpm" else ""}}}
        train: {{steps: 10, global_batch: 4}}
        sampling: {{sampler: ddim, steps: 4, unit_size: 8, batch_size: 4}}
        """
    )
    network, diffusion = snapshot.build(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    info = {"step": 10, "images_seen": 40, "kind": kind, "config": dump_config(cfg)}
    snapshot.save_snapshot(url, network, network.config, diffusion, info)
    return url


def make_order(snapshot_url: str, out: str, num_samples: int = 20, **values: object) -> Order:
    return Order(snapshot_url, out, num_samples, **{"sampling": SETTINGS, **values})  # type: ignore[arg-type]


class CountingWorker(SampleWorker):
    """Tells below a URL, under its process id, how often it has read a snapshot, and of which it made images."""

    def __init__(self, told: str) -> None:
        super().__init__(ClusterConfig())
        self._told = storage.join(told, str(os.getpid()))
        self._snapshots: set[str] = set()

    def images(self, manifest: Manifest, unit: Unit) -> tuple[Tensor, Tensor | None]:
        if not self._snapshots:
            time.sleep(2)  # so that the other worker comes to its share, too
        made = super().images(manifest, unit)
        self._snapshots.add(manifest.snapshot)
        told = {"loads": self.loads, "snapshots": sorted(self._snapshots)}
        storage.publish(self._told, json.dumps(told).encode())
        return made


def contents(out: str) -> dict[str, str]:
    """{name: SHA-256} of every object below a folder."""
    return {
        name: hashlib.sha256(storage.read(storage.join(out, name))).hexdigest() for name in storage.list_objects(out)
    }
