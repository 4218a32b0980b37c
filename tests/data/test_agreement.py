"""verify_shards is the judge: index, verify, make and stream agree on every sample of odd sets, or all refuse.

Each set is drawn from a seed: tars of images of every form, some damaged, some odd, with members beside them, and then
perhaps a damaged tar. What is held: where index_shards refuses, nothing is written but what it may go on from; where it
takes the set, verify names exactly the samples that the loader can't decode at any number of ranks, and make_shards
with --format keep takes exactly the others.
"""

import io
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.data.build import build, make_plan, run_in_processes
from ddpm_dist.data.decode import encode_raw
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import DataIndex, load_index
from ddpm_dist.data.loader import Loader
from ddpm_dist.data.sources import SourceOptions
from ddpm_dist.data.stream import iterate_raw
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.errors import BadSamplesError, DdpmDistError
from tests.data.others import tarred, with_size
from tests.data.small_sets import config

Generator = np.random.Generator
BATCH = 3


def picture(draw: Generator) -> tuple[bytes, str]:
    """(image file, extension) of any form and mode."""
    size = (int(draw.integers(1, 20)), int(draw.integers(1, 20)))
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    form, mode, extension = [
        ("PNG", "RGB", "png"), ("PNG", "L", "PNG"), ("PNG", "RGBA", "png"), ("PNG", "P", "png"), ("JPEG", "RGB", "jpg"),
        ("JPEG", "L", "jpeg"), ("JPEG", "CMYK", "jpe"), ("WEBP", "RGB", "webp"), ("GIF", "P", "gif"),
        ("BMP", "RGB", "bmp"), ("TIFF", "L", "tif"), ("PPM", "RGB", "ppm"), ("npy", "", "npy"),
    ][int(draw.integers(13))]  # fmt: skip
    if form == "npy":
        return encode_raw(pixels), extension
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form)
    return out.getvalue(), extension


def flipped(data: bytes, draw: Generator) -> bytes:
    changed = bytearray(data)
    changed[int(draw.integers(len(changed)))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


DAMAGE: list[Callable[[bytes, Generator], bytes]] = [
    flipped,
    lambda data, draw: data[: int(draw.integers(len(data)))],
    lambda data, draw: b"",
    lambda data, draw: b"no image at all",
    lambda data, draw: data + draw.bytes(20),
    lambda data, draw: data[:-2] + bytes(9) + data[-2:],
    lambda data, draw: data[: len(data) // 2] + draw.bytes(5) + data[len(data) // 2 :],
]


def members(draw: Generator, count: int, first: int, labels: bool) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        data, extension = picture(draw)
        if draw.random() < 0.25:
            data = DAMAGE[int(draw.integers(len(DAMAGE)))](data, draw)
        key = f"d{i % 2}/{i:03d}" if draw.random() < 0.5 else f"{i:03d}"
        sample = [(f"{key}.{extension}", data)] if draw.random() > 0.04 else []
        if labels:
            sample.append((f"{key}.cls", b"%d" % draw.integers(3)))
        if draw.random() < 0.2 or not sample:
            sample.append((f"{key}.json", b"{}"))
        if draw.random() < 0.05:
            sample.append((f"d/._{i}.png", b"\0\5\x16\7"))
        if draw.random() < 0.01:
            sample.append((f"{key}.{extension}.jpg", data))
        if draw.random() < 0.01:
            sample.append((f"{key}.webp", data))
        found += sample
    return found


def damaged_tar(data: bytes, draw: Generator) -> bytes:
    kind = int(draw.integers(5))
    if kind == 0:
        return data[: int(draw.integers(len(data)))]
    if kind == 1:
        return data + data
    if kind == 2:
        return with_size(data, 0, int(draw.choice([-512, 2**40, 0, 511])))
    if kind == 3:
        return flipped(data[:2048], draw) + data[2048:]
    return data.rstrip(b"\0")


def write_others(url: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = bool(draw.random() < 0.5)
    for shard in range(int(draw.integers(1, 4))):
        data = tarred(members(draw, int(draw.integers(4, 9)), 10 * shard, labels))
        storage.publish(f"{url}/{shard}.tar", damaged_tar(data, draw) if draw.random() < 0.06 else data)


def bad_by_verify(url: str) -> set[str]:
    """Keys of the samples that verify_shards names; it has nothing else to say."""
    named = set()
    for problem in verify_shards(url):
        found = re.match(r"sample (\S+) (can't be decoded|has no image)", problem.what)
        assert found, problem
        named.add(found[1])
    return named


Seen = tuple[set[str], list[tuple[str, int]]]


def bad_by_stream(url: str, index: DataIndex, world: int, caplog: pytest.LogCaptureFixture) -> Seen:
    """(keys that the loader couldn't decode in three epochs, key and sum of the image at all places)."""
    caplog.clear()
    cfg = config(url, batch=BATCH, world=world, max_bad_fraction=1.0, shuffle_block=4)
    steps = 3 * (index.num_samples // BATCH)
    places: list[list[tuple[str, int]]] = [[] for _ in range(steps)]
    for rank in range(world):
        loader = Loader(cfg, rank, world)
        try:
            for batch in itertools.islice(loader.batches(0), steps):
                places[batch.step] += zip(batch.keys, batch.images.flatten(1).sum(1).tolist(), strict=True)
        finally:
            loader.close()
    named = {found[1] for found in re.finditer(r"sample (\S+) can't be decoded", caplog.text)}
    return named, [place for batch in places for place in batch]


def taken_by_make(url: str, out: str) -> set[str]:
    options = SourceOptions((url,))
    plan = make_plan(
        "webdataset", options, format="keep", quality=95, channels=None, shuffle_seed=None, skip_bad=True,
        samples_per_shard=10, bytes_per_shard=1,
    )  # fmt: skip
    build(plan, out, lambda *arguments: run_in_processes(1, *arguments))
    return {sample.key for sample in iterate_raw(out)}


def check(folder: Path, seed: int, caplog: pytest.LogCaptureFixture, outcomes: dict[str, int]) -> None:
    url = f"file://{folder}/{seed}"
    write_others(url, seed)
    before = {path: path.read_bytes() for path in (folder / str(seed)).rglob("*.tar")}
    try:
        index = index_shards(url)
    except DdpmDistError:
        outcomes["refused"] += 1
        with pytest.raises(DdpmDistError):
            load_index(url)
        with pytest.raises(DdpmDistError):
            verify_shards(url)
        assert {path: path.read_bytes() for path in (folder / str(seed)).rglob("*.tar")} == before
        return
    caplog.set_level(logging.WARNING)
    keys = [sample.key for sample in iterate_raw(url)]
    bad = bad_by_verify(url)
    assert bad <= set(keys)
    outcomes["damaged" if bad else "whole"] += 1
    kept = {key.split("_", 1)[1] for key in taken_by_make(url, f"file://{folder}/{seed}-made")}
    assert kept == {re.sub(r"[^A-Za-z0-9_-]+", "_", key) for key in keys if key not in bad}
    assert verify_shards(f"file://{folder}/{seed}-made") == []
    if len(bad) == len(keys):
        return
    try:
        alone, places = bad_by_stream(url, index, 1, caplog)
    except BadSamplesError:  # a batch of nothing else
        with pytest.raises(BadSamplesError):
            bad_by_stream(url, index, 3, caplog)
        return
    together, same_places = bad_by_stream(url, index, 3, caplog)
    assert alone == together
    assert places == same_places
    assert alone <= bad
    assert not bad & {key for key, _ in places}
    if index.num_samples % BATCH == 0:  # every sample was seen
        assert alone == bad


def test_index_verify_make_and_stream_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = {"refused": 0, "damaged": 0, "whole": 0}
    for seed in range(12):
        check(tmp_path, seed, caplog, outcomes)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.full
def test_they_agree_on_some_hundreds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = {"refused": 0, "damaged": 0, "whole": 0}
    for seed in range(100, 400):
        check(tmp_path, seed, caplog, outcomes)
    assert min(outcomes.values()) > 5, outcomes
