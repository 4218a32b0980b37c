"""The disk cache: hits, limit, verification, many processes at once."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist.data.cache import DiskCache
from ddpm_dist.data.index import ShardInfo, content_hash
from ddpm_dist.errors import ConfigError, ShardError
from tests.data.small_sets import config, global_batches, write_set
from tests.faulty_proxy import FaultyProxy


def shard_of(data: bytes, name: str = "s.tar") -> ShardInfo:
    return ShardInfo(name, len(data), 1, content_hash(data), 0, "")


class Store:
    """A store that counts."""

    def __init__(self, data: bytes) -> None:
        self.data, self.reads = data, 0

    def __call__(self, start: int, length: int) -> bytes:
        self.reads += 1
        return self.data[start : start + length]


def test_a_shard_is_fetched_once(tmp_path: Path) -> None:
    store = Store(os.urandom(50_000))
    cache = DiskCache(str(tmp_path), 10**6)
    for start in (0, 77, 49_000):
        assert cache.read(shard_of(store.data), start, 900, store) == store.data[start : start + 900]
    assert store.reads == 1


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    stores = [Store(os.urandom(1000)) for _ in range(4)]
    cache = DiskCache(str(tmp_path), 3000)
    for turn, number in enumerate([0, 1, 2, 0, 3]):
        cache.read(shard_of(stores[number].data), 0, 10, stores[number])
        os.utime(tmp_path / f"{shard_of(stores[number].data).hash}.tar", ns=(turn, turn))
    there = {path.stem for path in tmp_path.glob("*.tar")}
    assert there == {shard_of(stores[number].data).hash for number in (0, 2, 3)}


def test_a_wrong_shard_never_enters(tmp_path: Path) -> None:
    store = Store(os.urandom(1000))
    shard = shard_of(b"x" * 1000)
    with pytest.raises(ShardError, match=r"s\.tar: altered"):
        DiskCache(str(tmp_path), 10**6).read(shard, 0, 10, store)
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    store = Store(bytes(1000))
    with pytest.raises(ConfigError, match=r"data\.cache_bytes: 999"):
        DiskCache(str(tmp_path), 999).read(shard_of(store.data), 0, 10, store)


def _hammer(folder: str, seed: int, results: Any) -> None:
    import numpy as np

    shards = [np.random.default_rng(i).bytes(20_000) for i in range(6)]
    cache = DiskCache(folder, 45_000)  # room for two of six
    wrong = 0
    for number in np.random.default_rng(seed).integers(0, 6, 50).tolist():
        data = shards[number]
        wrong += cache.read(shard_of(data), 5, 100, lambda s, n, d=data: d[s : s + n]) != data[5:105]
    results.put(wrong)


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed, results)) for seed in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [0, 0]
    for process in processes:
        process.join()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 45_000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_second_epoch_comes_from_the_disk(faulty_proxy: FaultyProxy, bucket_url: str, tmp_path: Path) -> None:
    write_set(bucket_url, [24] * 6)
    plain = global_batches(config(bucket_url), 1, 0, 12)
    cached = config(bucket_url, cache_dir=str(tmp_path))
    assert global_batches(cached, 1, 0, 12) == plain
    faulty_proxy.requests.clear()
    assert global_batches(cached, 1, 0, 12) == plain
    assert not [request for request in faulty_proxy.requests if request.path.partition("?")[0].endswith(".tar")]
