"""Damage of every kind: found, named, counted; never a silent end."""

import itertools
import logging
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import storage
from ddpm_dist.data import tar
from ddpm_dist.data.decode import CAUSES, BadSampleError, decode, encode_png
from ddpm_dist.data.index import load_index
from ddpm_dist.data.loader import Loader
from ddpm_dist.data.stream import iterate
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.data.writer import EncodedSample, index_tar, shard_bytes
from ddpm_dist.errors import BadSamplesError, DdpmDistError, ShardError
from ddpm_dist.storage import filesystem
from tests.data.small_sets import ENCODERS, config, global_batches, random_images, write_set, write_with_bad
from tests.faulty_proxy import Fault, FaultyProxy
from tools.local.s3_server import S3Server

IMAGES = random_images(96)  # those of write_with_bad
BAD = {
    "empty": b"",
    "not_an_image": b"this is a text file that somebody named .png",
    "corrupt": encode_png(IMAGES[0])[:80],
}


def bomb() -> bytes:
    """A PNG of 60,000 × 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def cause_of(image: bytes) -> str | None:
    """Why an image can't be decoded; None if it can."""
    try:
        decode(image, 8, 3)
    except BadSampleError as error:
        return error.cause
    return None


def test_bad_samples_are_counted_by_cause_and_replaced_in_place(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bad"
    bad = {5: BAD["empty"], 30: BAD["not_an_image"], 31: BAD["corrupt"], 77: bomb()}
    write_with_bad(url, bad)
    write_with_bad(f"file://{tmp_path}/good", {})
    whole = global_batches(config(f"file://{tmp_path}/good"), 1, 0, 4)
    cfg = config(url, max_bad_fraction=0.1)
    loader = Loader(cfg, 0, 1)
    epoch = list(itertools.islice(loader.batches(0), 4))
    loader.close()
    assert epoch[-1].bad == {"empty": 1, "not_an_image": 1, "corrupt": 1, "too_large": 1}
    bad_keys = {f"{i:03d}" for i in bad}
    for batch, (wanted, _, _) in zip(epoch, whole, strict=True):
        for place, key in enumerate(wanted):
            if key not in bad_keys:
                assert batch.keys[place] == key  # positions never shift
                continue
            following = wanted[place + 1 :] + wanted[:place]
            assert batch.keys[place] == next(k for k in following if k not in bad_keys)
            number = int(batch.keys[place])
            assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), IMAGES[number])
            assert batch.labels is not None
            assert batch.labels[place] == number % 3


def test_replacements_are_the_same_at_any_world_size(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_with_bad(url, dict.fromkeys(range(0, 96, 3), BAD["corrupt"]))
    alone = global_batches(config(url, max_bad_fraction=0.9, flip=True), 1, 0, 8)
    for world in (2, 8, 24):
        assert global_batches(config(url, max_bad_fraction=0.9, world=world, flip=True), world, 0, 8) == alone
    assert global_batches(config(url, max_bad_fraction=0.9, workers=2, flip=True), 1, 0, 8) == alone


def test_too_many_bad_samples_are_fatal(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_with_bad(url, dict.fromkeys((3, 50, 51), BAD["corrupt"]))
    for fraction, fatal in ((0.0, True), (0.02, True), (0.04, False)):
        loader = Loader(config(url, max_bad_fraction=fraction), 0, 1)
        batches = itertools.islice(loader.batches(0), 8)
        if fatal:
            with pytest.raises(BadSamplesError, match=r"data.max_bad_fraction: \d of \d+ .*\(\d corrupt\).* verify"):
                list(batches)
        else:
            assert list(batches)[-1].bad == {"corrupt": 6}
        loader.close()


def test_a_batch_of_bad_samples_ends_with_an_error(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_with_bad(url, dict.fromkeys(range(96), b"x"))
    loader = Loader(config(url, max_bad_fraction=1.0), 0, 1)
    with pytest.raises(BadSamplesError, match="none of the 24 samples"):
        next(loader.batches(0))
    loader.close()


def run_epoch(url: str) -> None:
    loader = Loader(config(url), 0, 1)
    try:
        for _ in itertools.islice(loader.batches(0), loader.steps_per_epoch):
            pass
    finally:
        loader.close()


@pytest.mark.parametrize("where", ["between members", "inside a header", "inside data", "missing", "flipped", "longer"])
def test_a_damaged_shard_is_named(bucket_url: str, where: str) -> None:
    write_set(bucket_url, [24] * 4)
    url = f"{bucket_url}/s-002.tar"
    data = storage.read(url)
    samples = tar.walk(data, "s")
    member = next(m for m in samples[12] if m.extension == "png")
    if where == "missing":
        storage.delete(url)
    else:
        flipped = bytearray(data)
        flipped[member.offset + 20] ^= 0x10
        damaged = {
            "between members": data[: member.offset - 512],
            "inside a header": data[: member.offset - 200],
            "inside data": data[: member.offset + 30],
            "flipped": bytes(flipped),
            "longer": data + bytes(512),
        }[where]
        storage.publish(url, damaged)
    word = {"missing": "missing", "flipped": f"altered: sample {member.key}", "longer": "altered"}.get(
        where, "truncated"
    )
    with pytest.raises(ShardError, match=rf"s-002\.tar.*{word}.*data\.exclude_shards"):
        run_epoch(bucket_url)
    with pytest.raises(ShardError, match=r"s-002\.tar"):
        list(iterate(bucket_url))
    problems = verify_shards(bucket_url)
    assert {problem.shard for problem in problems} == {"s-002.tar"}
    left = config(bucket_url, exclude_shards=("s-002.tar",))
    assert len(global_batches(left, 1, 0, 6)) == 6


@pytest.mark.parametrize("place", ["between members", "inside a header", "inside data", "after the data", "no end"])
def test_walking_a_cut_tar_is_an_error_where_webdataset_ends_silently(place: str) -> None:
    images = random_images(6)
    data = shard_bytes([EncodedSample(f"{i}", encode_png(images[i]), "png", i) for i in range(6)])
    assert len(tar.walk(data, "whole")) == 6
    member = tar.walk(data, "whole")[3][0]
    end = member.offset + -(-member.size // 512) * 512
    cut = {
        "between members": member.offset - 512,
        "inside a header": member.offset - 100,
        "inside data": member.offset + 7,
        "after the data": end,
        "no end": len(data.rstrip(b"\0")) + 100,
    }[place]
    with pytest.raises(ShardError, match=r"s.tar: truncated"):
        tar.walk(data[:cut], "s.tar")


def test_walking_an_altered_header_is_an_error() -> None:
    images = random_images(6)
    data = bytearray(shard_bytes([EncodedSample(f"{i}", encode_png(images[i]), "png") for i in range(6)]))
    offset = tar.walk(bytes(data), "whole")[3][0].offset
    data[offset - 512 + 3] ^= 1
    with pytest.raises(ShardError, match=r"s.tar: altered: a header at byte \d+"):
        tar.walk(bytes(data), "s.tar")
    with pytest.raises(ShardError, match="empty"):
        tar.walk(b"", "s.tar")


def test_every_flipped_bit_of_an_image_is_seen(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_set(url, [24], extension="npy")
    data = storage.read(f"{url}/s-000.tar")
    samples = tar.walk(data, "s")
    generator = np.random.default_rng(1)
    for number in generator.integers(0, 24, 8).tolist():
        image = next(member for member in samples[number] if member.extension == "npy")
        flipped = bytearray(data)
        flipped[image.offset + int(generator.integers(image.size))] ^= 1 << int(generator.integers(8))
        storage.publish(f"{url}/s-000.tar", bytes(flipped))
        with pytest.raises(ShardError, match=f"sample {image.key} differs from its checksum"):
            run_epoch(url)


def test_an_altered_or_missing_table_is_named(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_set(url, [30])
    table = f"{url}/index/s-000.tar.samples"
    data = bytearray(storage.read(table))
    data[60] ^= 1
    storage.publish(table, bytes(data))
    with pytest.raises(ShardError, match=r"index/s-000\.tar\.samples: altered"):
        run_epoch(url)
    assert [problem.what for problem in verify_shards(url)] == [
        "its table index/s-000.tar.samples is altered: its hash is not the one in the index"
    ]
    storage.delete(table)
    with pytest.raises(ShardError, match=r"index/s-000\.tar\.samples: missing"):
        run_epoch(url)
    shard = bytearray(storage.read(f"{url}/s-000.tar"))
    shard[600] ^= 1
    storage.publish(f"{url}/s-000.tar", bytes(shard))
    assert [problem.what for problem in verify_shards(url)] == [
        "altered: its hash is not the one in the index",
        "its table index/s-000.tar.samples is missing",
    ]


def test_an_altered_index_is_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_set(url, [30])
    text = storage.read(f"{url}/index.json").replace(b', 30, "', b', 29, "')
    storage.publish(f"{url}/index.json", text)
    with pytest.raises(DdpmDistError, match="altered"):
        load_index(url)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.SHORT, Fault.WRONG_BYTES, Fault.UNAVAILABLE, Fault.RESET])
def test_a_faulty_network_changes_nothing(
    faulty_proxy: FaultyProxy, bucket_url: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(bucket_url, [24] * 6)
    cfg = config(bucket_url)
    wanted = global_batches(cfg, 1, 0, 8)
    for after in (2, 7, 11):
        faulty_proxy.inject(fault, path="s-00", after=after, times=2)
    with caplog.at_level(logging.INFO):
        assert global_batches(cfg, 1, 0, 8) == wanted
    assert faulty_proxy.faults_met().count(fault) == 6
    if fault is Fault.WRONG_BYTES:
        assert "read again" in caplog.text


def test_a_stalled_answer_is_given_up(
    faulty_proxy: FaultyProxy, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(bucket_url, [24] * 6)
    monkeypatch.setattr(filesystem, "READ_TIMEOUT_S", 1)
    storage.clear_instances()
    wanted = global_batches(config(bucket_url), 1, 0, 6)
    faulty_proxy.inject(Fault.STALL, path="s-00", after=3)
    assert global_batches(config(bucket_url), 1, 0, 6) == wanted
    assert faulty_proxy.faults_met() == [Fault.STALL]


def test_a_store_that_dies_in_mid_epoch_and_comes_back(
    s3_server: S3Server, bucket_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(bucket_url, [24] * 20)
    cfg = config(bucket_url, shuffle_block=4, read_ahead=1)
    wanted = global_batches(cfg, 1, 0, 30)
    loader = Loader(cfg, 0, 1)
    batches = loader.batches(0)
    found = [next(batches).keys for _ in range(5)]
    s3_server.kill()
    back = threading.Timer(15, lambda: None)
    back.start()
    collector: list[list[str]] = []
    reader = threading.Thread(target=lambda: collector.extend(next(batches).keys for _ in range(25)))
    with caplog.at_level(logging.WARNING):
        reader.start()
        back.join()
        s3_server.restart()  # in the main thread: the server dies with the thread that starts it
        reader.join(60)
    loader.close()
    assert found + collector == [keys for keys, _, _ in wanted]
    assert "the store doesn't answer" in caplog.text


def test_fuzzed_shards_give_errors_of_ours_only(tmp_path: Path) -> None:
    """Bytes of a whole shard, altered at random: walk, index, and decode never crash, hang, or raise else."""
    extensions = list(ENCODERS)
    samples = [
        EncodedSample(f"{i}", ENCODERS[extensions[i % 3]](IMAGES[i]), extensions[i % 3], i % 5) for i in range(9)
    ]
    data = shard_bytes(samples)
    generator = np.random.default_rng(7)
    deadline = time.monotonic() + 10
    rounds = 0
    while time.monotonic() < deadline:
        altered = bytearray(data)
        for _ in range(int(generator.integers(1, 6))):
            kind, at = generator.integers(3), int(generator.integers(len(altered)))
            if kind == 0:
                altered[at] = int(generator.integers(256))
            elif kind == 1:
                del altered[at : at + int(generator.integers(600))]
            else:
                altered[at:at] = generator.bytes(int(generator.integers(600)))
            if not altered:
                altered = bytearray(b"x")
        rounds += 1
        try:
            _, table = index_tar("s.tar", bytes(altered))
        except DdpmDistError:
            continue
        for row in table.rows:
            start = int(row["offset"])
            assert cause_of(bytes(altered[start : start + int(row["size"])])) in (None, *CAUSES)
    assert rounds > 50


@pytest.mark.full
@pytest.mark.parametrize("extension", ["png", "jpg", "npy"])
def test_fuzzed_images_for_a_minute(extension: str) -> None:
    image = ENCODERS[extension](random_images(1, 24)[0])
    generator = np.random.default_rng(3)
    deadline = time.monotonic() + 25
    while time.monotonic() < deadline:
        altered = bytearray(image)
        for at in generator.integers(0, len(altered), int(generator.integers(1, 5))).tolist():
            altered[at] = int(generator.integers(256))
        altered = altered[: int(generator.integers(1, len(altered) + 1))] if generator.random() < 0.3 else altered
        assert cause_of(bytes(altered)) in (None, *CAUSES)
