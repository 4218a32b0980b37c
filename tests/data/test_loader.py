"""The loader over a real S3 server: elastic, resumable, bounded."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_dist import rng, storage
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.loader import Loader, open_sets
from ddpm_dist.data.order import Order
from ddpm_dist.data.stream import LoadedBlock, iterate
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from tests.data.small_sets import config, global_batches, random_images, write_set
from tests.faulty_proxy import FaultyProxy

COUNTS = [40, 37, 1, 60, 22, 51, 33]  # 244 samples: 10 batches of 24, 2 of 96


@pytest.mark.parametrize(
    ("batch", "worlds"), [(24, (2, 4, 8)), (96, (3, 6))], ids=["batch 24", "batch 96, 3 and 6 ranks"]
)
def test_global_batches_are_the_same_at_any_world_size(bucket_url: str, batch: int, worlds: tuple[int, ...]) -> None:
    write_set(bucket_url, COUNTS)
    steps = 3 * (sum(COUNTS) // batch)
    alone = global_batches(config(bucket_url, batch=batch, flip=True), 1, 0, steps)
    for world in worlds:
        assert global_batches(config(bucket_url, batch=batch, flip=True, world=world), world, 0, steps) == alone
    epochs = [alone[e * steps // 3 : (e + 1) * steps // 3] for e in range(3)]
    for epoch in epochs:
        keys = [key for keys, _, _ in epoch for key in keys]
        assert len(set(keys)) == len(keys) == sum(COUNTS) - sum(COUNTS) % batch
    assert [keys for keys, _, _ in epochs[0]] != [keys for keys, _, _ in epochs[1]]


def test_loader_processes_change_nothing(bucket_url: str) -> None:
    write_set(bucket_url, COUNTS)
    alone = global_batches(config(bucket_url, flip=True), 1, 3, 12)
    for workers in (1, 3):
        assert global_batches(config(bucket_url, flip=True, workers=workers), 1, 3, 12) == alone


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "world"), [(24, 1), (24, 2), (24, 4), (24, 8), (96, 3), (96, 6)])
def test_whole_matrix(bucket_url: str, batch: int, world: int, workers: int) -> None:
    write_set(bucket_url, COUNTS)
    steps = 3 * (sum(COUNTS) // batch)
    alone = global_batches(config(bucket_url, batch=batch, flip=True), 1, 0, steps)
    assert (
        global_batches(config(bucket_url, batch=batch, world=world, workers=workers, flip=True), world, 0, steps)
        == alone
    )


def test_batches_hold_the_images_that_were_written(tmp_path: Path) -> None:
    """Against the arrays themselves: pixels, labels and keys belong together, flips are contract 2's."""
    url = f"file://{tmp_path}"
    write_set(url, COUNTS)
    images = torch.from_numpy(random_images(sum(COUNTS))).permute(0, 3, 1, 2)
    cfg = config(url, flip=True)
    (index,), _ = open_sets(cfg)
    assert index.num_samples == sum(COUNTS)
    loader = Loader(cfg, 0, 1)
    mirrored = 0
    for batch in itertools.islice(loader.batches(8), 6):
        assert batch.images.shape == (24, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.labels is not None
        for place, key in enumerate(batch.keys):
            number = int(key.partition("_")[2])
            draw = rng.uniform(5, rng.Purpose.FLIP, torch.tensor([number]), step=batch.epoch).item()
            wanted = images[number].flip(-1) if draw < 0.5 else images[number]
            assert torch.equal(batch.images[place], wanted)
            assert batch.labels[place] == number % 7
            mirrored += draw < 0.5
    loader.close()
    assert 40 < mirrored < 104


def test_resume_is_the_same_as_never_having_stopped(bucket_url: str) -> None:
    write_set(bucket_url, COUNTS)
    cfg = config(bucket_url)
    unbroken = global_batches(cfg, 1, 0, 34)
    for start in (1, 9, 10, 17, 29):
        assert global_batches(cfg, 1, start, 5) == unbroken[start : start + 5]


def test_a_resume_reads_a_bounded_part(faulty_proxy: FaultyProxy, bucket_url: str) -> None:
    """Before the first batch: the index, and at most 2 blocks for each stream and 2 for each reader, with tables."""
    index = write_set(bucket_url, [50] * 40, extension="npy", size=16)
    cfg = config(bucket_url, batch=8, image_size=16, streams=4, shuffle_block=16, read_ahead=2)
    per_sample = max(shard.bytes for shard in index.shards) / 50
    tables = max(shard.table_bytes for shard in index.shards)
    for start in (0, 123, 240):
        faulty_proxy.requests.clear()
        loader = Loader(cfg, 0, 1)
        next(loader.batches(start))
        loader.close()
        blocks = 2 * 4 + 2 * 2
        read = [request for request in faulty_proxy.requests if ".tar" in request.path and request.method == "GET"]
        assert sum(request.sent for request in read) <= blocks * 16 * per_sample + 2 * blocks * tables
        assert len(read) <= 4 * blocks


def test_mixing_is_the_same_at_any_world_size(tmp_path: Path) -> None:
    urls = {f"file://{tmp_path}/a": 1.0, f"file://{tmp_path}/b": 2.0}
    for seed, url in enumerate(urls):
        write_set(url, [50, 70], seed=seed)
    alone = global_batches(config(urls, flip=True), 1, 0, 20)
    for keys, _, _ in alone:
        assert sum(key.startswith("0_") for key in keys) == 8
    assert global_batches(config(urls, world=4, flip=True), 4, 0, 20) == alone
    assert global_batches(config(dict(reversed(urls.items())), flip=True), 1, 0, 20) == alone
    weights = Loader(config({**urls, f"file://{tmp_path}/a": 2.0}), 0, 1).content_id
    assert weights != Loader(config(urls), 0, 1).content_id


def test_a_set_under_two_urls_is_refused(tmp_path: Path) -> None:
    """By content: another spelling, or a copy."""
    url = f"file://{tmp_path}/a"
    write_set(url, [30])
    write_set(f"file://{tmp_path}/b", [30])
    for other in (f"{url}/", f"file://{tmp_path}/b"):
        with pytest.raises(
            ConfigError, match=r"data\.url: file:.*/a and file:.* hold the same shards; name the set once"
        ):
            Loader(config({url: 1.0, other: 2.0}), 0, 1)


def test_excluded_shards_make_a_new_content_id(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_set(url, COUNTS)
    whole, less = Loader(config(url), 0, 1), Loader(config(url, exclude_shards=("s-003.tar",)), 0, 1)
    assert whole.content_id != less.content_id
    keys = {key for batch in itertools.islice(less.batches(0), less.steps_per_epoch * 2) for key in batch.keys}
    less.close()
    assert keys.isdisjoint(f"0_{i:05d}" for i in range(78, 138))
    with pytest.raises(ConfigError, match=r"no shard is called 's-9.tar'"):
        Loader(config(url, exclude_shards=("s-9.tar",)), 0, 1)


def test_a_moved_set_is_the_same_set(tmp_path: Path) -> None:
    write_set(f"file://{tmp_path}/a", COUNTS)
    write_set(f"file://{tmp_path}/b", COUNTS)
    one, two = Loader(config(f"file://{tmp_path}/a"), 0, 1), Loader(config(f"file://{tmp_path}/b"), 0, 1)
    assert one.content_id == two.content_id


def test_memory_is_checked_at_the_start(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_set(url, [400] * 4, extension="npy")
    with pytest.raises(ConfigError, match=r"data.shuffle_block: 256 .* use a block of \d+") as error:
        Loader(config(url, shuffle_block=256, buffer_bytes=200_000), 0, 1)
    fits = int(str(error.value).partition("a block of ")[2].partition(",")[0])
    Loader(config(url, shuffle_block=fits, buffer_bytes=200_000), 0, 1)


def test_a_start_says_what_too_few_streams_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}"
    write_set(url, COUNTS)
    for world, streams, cost in ((6, 6, None), (12, 6, "2 samples come"), (24, 3, "8 samples come"), (24, 24, None)):
        caplog.clear()
        loader = Loader(config(url, streams=streams), 0, world)
        next(loader.batches(0))
        loader.close()
        assert (cost is None) == ("data.streams" not in caplog.text)
        if cost:
            assert f"{cost} from the store for each" in caplog.text
            assert f"data.streams={world} reads each once" in caplog.text


def test_blocks_in_memory_stay_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_dist.data import stream

    url = f"file://{tmp_path}"
    write_set(url, [100] * 16, extension="npy")
    held: list[int] = []
    original = stream.Window.samples

    def watched(window, step):  # type: ignore[no-untyped-def]
        found = list(original(window, step))
        held.append(window._bytes)
        return iter(found)

    monkeypatch.setattr(stream.Window, "samples", watched)

    def most_held(budget: int) -> int:
        held.clear()
        loader = Loader(config(url, shuffle_block=64, buffer_bytes=budget), 0, 1)
        for _ in itertools.islice(loader.batches(0), 150):
            pass
        loader.close()
        return max(held)

    free = most_held(2**30)
    assert 3_450_000 < most_held(3_500_000) <= 3_500_000 < free


def test_a_block_keeps_what_is_still_to_be_dealt_and_no_more(tmp_path: Path) -> None:
    """Half of a shard's bytes are headers and padding, half of a block's samples are dealt half-way."""
    index = write_set(f"file://{tmp_path}", [64], extension="npy")
    reader, order = ShardReader(index), Order([[64]], seed=1, global_batch=8, streams=1, shuffle_block=64)
    (block,) = itertools.islice(order.blocks(0, 8, 0), 1)
    tracemalloc.start()
    loaded = LoadedBlock(
        block, [reader.load(extent) for extent in order.sets[0].extents(block)], order.sets[0].deal(block).tolist(), 0
    )
    whole = tracemalloc.get_traced_memory()[0]
    first = [sample.key for sample in loaded.deal(0, 32)]
    half = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(set(first)) == 32
    assert half < 0.65 * whole < 0.65 * 0.6 * index.num_bytes
    with pytest.raises(KeyError):
        loaded.deal(31, 33)


def test_iterate_gives_every_sample_once_in_order(bucket_url: str) -> None:
    write_set(bucket_url, COUNTS)
    images = random_images(sum(COUNTS)).transpose(0, 3, 1, 2)
    found = list(iterate(bucket_url))
    assert [sample.key for sample in found] == [f"0_{i:05d}" for i in range(sum(COUNTS))]
    assert np.array_equal(np.stack([sample.image for sample in found]), images)
    assert [sample.label for sample in found] == [i % 7 for i in range(sum(COUNTS))]
    parts = [list(iterate(bucket_url, (k, 3))) for k in range(3)]
    assert [sample.key for part in parts for sample in part] == [sample.key for sample in found]
    assert next(iterate(bucket_url, image_size=4, channels=1)).image.shape == (1, 4, 4)


def test_close_ends_threads_and_processes(tmp_path: Path) -> None:
    import multiprocessing
    import threading

    url = f"file://{tmp_path}"
    write_set(url, COUNTS)
    loader = Loader(config(url, workers=2), 0, 1)
    next(loader.batches(0))
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()
    assert not [t for t in threading.enumerate() if t.name == "data-batches"]


def test_a_killed_loader_process_is_named(tmp_path: Path) -> None:
    import multiprocessing

    url = f"file://{tmp_path}"
    write_set(url, COUNTS)
    loader = Loader(config(url, workers=1), 0, 1)
    batches = loader.batches(0)
    next(batches)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(DataError, match="a loader process ended with exit code -9"):
        list(itertools.islice(batches, 20))
    loader.close()


def test_bad_input_has_one_clear_message(tmp_path: Path, bucket_url: str) -> None:
    with pytest.raises(NotFoundError, match=r"data.url: .*index.json.*ddpm-shards make"):
        Loader(config(bucket_url), 0, 1)
    with pytest.raises(NotFoundError, match="there is no bucket"):
        Loader(config("s3://there-is-no-such-bucket/x"), 0, 1)
    storage.publish(f"{bucket_url}/index.json", b"{}")
    with pytest.raises(DataError, match="not an index of a data set"):
        Loader(config(bucket_url), 0, 1)
    url = f"file://{tmp_path}"
    write_set(url, [10])
    with pytest.raises(ConfigError, match="a batch takes 24 samples of a data set that has 10"):
        Loader(config(url), 0, 1)


def test_labels_are_none_where_there_are_none(tmp_path: Path) -> None:
    from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
    from tests.data.small_sets import encode_png

    url = f"file://{tmp_path}"
    images = random_images(30)
    shard = write_shard(url, "a.tar", [EncodedSample(f"{i}", encode_png(images[i]), "png") for i in range(30)])
    assert write_index(url, [shard]).num_classes is None
    loader = Loader(config(url), 0, 1)
    assert loader.num_classes is None
    assert next(loader.batches(0)).labels is None
    loader.close()
