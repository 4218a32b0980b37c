"""Small data sets of random images, and configurations that read them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ddpm_dist.config import Config
from ddpm_dist.data.decode import Pixels, encode_jpeg, encode_png, encode_raw
from ddpm_dist.data.index import DataIndex
from ddpm_dist.data.loader import Batch, Loader
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard

ENCODERS = {"png": encode_png, "npy": encode_raw, "jpg": lambda pixels: encode_jpeg(pixels, 90)}


def random_images(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> Pixels:
    """[count, size, size, channels]; no two are alike."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def write_set(url: str, counts: Sequence[int], *, extension: str = "png", seed: int = 0, **shape: int) -> DataIndex:
    """Shards of so many samples each; keys count up, labels are key mod 7."""
    images = random_images(sum(counts), seed=seed, **shape)
    written, number = [], 0
    for shard, count in enumerate(counts):
        samples = [
            EncodedSample(f"{seed}_{i:05d}", ENCODERS[extension](images[i]), extension, i % 7)
            for i in range(number, number + count)
        ]
        written.append(write_shard(url, f"s-{shard:03d}.tar", samples))
        number += count
    return write_index(url, written)


def write_with_bad(url: str, bad: dict[int, bytes], count: int = 96) -> None:
    """A set of 4 shards in which some samples are something else than images."""
    images = random_images(count)
    samples = [EncodedSample(f"{i:03d}", bad.get(i, encode_png(images[i])), "png", i % 3) for i in range(count)]
    shards = [write_shard(url, f"s-{n}.tar", samples[n * count // 4 : (n + 1) * count // 4]) for n in range(4)]
    write_index(url, shards)


def config(url: str | dict[str, float], *, batch: int = 24, world: int = 1, **data: Any) -> Config:
    """A configuration for 8×8 RGB that a loader takes."""
    settings = {"url": url, "image_size": 8, "shuffle_block": 16, **data}
    return Config.model_validate(
        {
            "run": {"url": "memory://run", "seed": 5},
            "data": settings,
            "model": {"channel_mult": (1,), "attention_resolutions": ()},
            "train": {"steps": 10, "global_batch": batch},
            "precision": "fp32",
            "cluster": {"workers": world},
        }
    )


def digest(batches: Sequence[Batch]) -> tuple[list[str], str, list[int]]:
    """(keys, hash of the pixels, labels) of the global batch that ranks have together."""
    images = torch.cat([batch.images for batch in batches]).contiguous().numpy()
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None]).tolist()
    return [key for batch in batches for key in batch.keys], hashlib.sha256(images.tobytes()).hexdigest(), labels


def global_batches(cfg: Config, world: int, start: int, count: int) -> list[tuple[list[str], str, list[int]]]:
    """The global batches of some steps, put together from all ranks."""
    loaders = [Loader(cfg, rank, world) for rank in range(world)]
    try:
        iterators: list[Iterator[Batch]] = [loader.batches(start) for loader in loaders]
        found = []
        for step in range(start, start + count):
            batches = [next(iterator) for iterator in iterators]
            assert [batch.step for batch in batches] == [step] * world
            found.append(digest(batches))
        return found
    finally:
        for loader in loaders:
            loader.close()
