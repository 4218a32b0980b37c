"""Shards: deterministic bytes, readable by plain WebDataset, indexed right."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ddpm_dist import storage
from ddpm_dist.data import tar
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import load_index
from ddpm_dist.data.order import Extent
from ddpm_dist.data.reading import Reading
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.data.writer import EncodedSample, shard_bytes, write_index, write_shard
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from tests.data.small_sets import random_images, write_set


def samples(count: int, prefix: str = "") -> list[EncodedSample]:
    images = random_images(count)
    return [EncodedSample(f"{prefix}{i:03d}", encode_png(images[i]), "png", i % 4) for i in range(count)]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert shard_bytes(samples(9)) == shard_bytes(samples(9))
    for folder in ("a", "b"):
        write_set(f"file://{tmp_path}/{folder}", [5, 6])
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()


def test_plain_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write_set(f"file://{tmp_path}", [7, 5])
    images = random_images(12)
    dataset = webdataset.WebDataset(str(tmp_path / "s-{000..001}.tar"), shardshuffle=False).decode("rgb8")
    found = {sample["__key__"]: sample for sample in dataset}
    assert sorted(found) == [f"0_{i:05d}" for i in range(12)]
    for i in range(12):
        assert np.array_equal(found[f"0_{i:05d}"]["png"], images[i])
        assert found[f"0_{i:05d}"]["cls"] == i % 7


def test_plain_webdataset_reads_our_raw_shards(tmp_path: Path) -> None:
    write_set(f"file://{tmp_path}", [4], extension="npy")
    dataset = webdataset.WebDataset(str(tmp_path / "s-000.tar"), shardshuffle=False).decode()
    assert np.array_equal(np.stack([sample["npy"] for sample in dataset]), random_images(4))


def test_what_tarfile_and_other_writers_make_is_read(tmp_path: Path) -> None:
    """GNU and PAX tars with folders, long and non-ASCII names, other members, links; grouped as WebDataset does."""
    images = random_images(6)
    for name, form in (("gnu.tar", tarfile.GNU_FORMAT), ("pax.tar", tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / name, "w", format=form) as archive:
            archive.add(tmp_path, "folder", recursive=False)
            for i in range(6):
                stem = f"folder/{'long' * 60}/näme{i}"
                for extension, data in (("json", b'{"class": %d}' % i), ("PNG", encode_png(images[i])), ("txt", b"x")):
                    info = tarfile.TarInfo(f"{stem}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("folder/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            archive.addfile(link)
    url = f"file://{tmp_path}"
    index = index_shards(url, Reading(label="json:class"))
    assert [shard.samples for shard in index.shards] == [6, 6]
    assert index.num_classes == 6
    assert dict(index.schema.formats) == {"png": 12}
    assert index.schema.max_size == (8, 8)
    loaded = ShardReader(index).load(Extent(1, 0, 6))
    assert [loaded[i].image for i in range(6)] == [encode_png(image) for image in images]
    assert [loaded[i].label for i in range(6)] == list(range(6))
    assert loaded[3].key == f"folder/{'long' * 60}/näme3"
    assert verify_shards(url) == []


def test_index_shards_makes_the_index_that_the_writer_made(tmp_path: Path) -> None:
    url, copy = f"file://{tmp_path}/a", f"file://{tmp_path}/b"
    index = write_set(url, [5, 9, 2])
    for shard in index.shards:
        storage.publish(storage.join(copy, shard.name), storage.read(storage.join(url, shard.name)))
    assert index_shards(copy).content_id == index.content_id
    assert load_index(copy).schema == index.schema
    assert storage.list_names(copy) == storage.list_names(url)
    with pytest.raises(ConfigError, match="has an index already"):
        index_shards(copy)
    with pytest.raises(NotFoundError, match=r"no \.tar is there"):
        index_shards(f"file://{tmp_path}/c")


def test_index_shards_goes_on_and_names_damaged_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}"
    for i in range(4):
        storage.publish(f"{url}/{i}.tar", shard_bytes(samples(5, f"{i}-")))
    whole = storage.read(f"{url}/2.tar")
    storage.publish(f"{url}/2.tar", whole[:-11000])
    with pytest.raises(DataError, match=r"1 of 4 shards can't be indexed:\n  2.tar: truncated"):
        index_shards(url)
    storage.publish(f"{url}/2.tar", whole)
    read: list[str] = []
    original = storage.read
    monkeypatch.setattr(storage, "read", lambda place, *rest: read.append(place) or original(place, *rest))
    assert index_shards(url).num_samples == 20
    assert [place for place in read if place.endswith(".tar")] == [f"{url}/2.tar"]


def test_index_shards_goes_on_after_the_shards_or_the_labels_have_changed(tmp_path: Path) -> None:
    """What an earlier start left behind is used for the same shard and the same labels only."""
    url = f"file://{tmp_path}"
    for i in range(4):
        storage.publish(f"{url}/{i}.tar", shard_bytes(samples(5 + i, f"{i}-")))
    storage.publish(f"{url}/1.tar", b"")
    with pytest.raises(DataError, match="1 of 4 shards"):
        index_shards(url)
    storage.delete(f"{url}/1.tar")  # the others' numbers change
    storage.publish(f"{url}/0.tar", shard_bytes(samples(11, "new-")))
    index = index_shards(url)
    assert [(shard.name, shard.samples) for shard in index.shards] == [("0.tar", 11), ("2.tar", 7), ("3.tar", 8)]
    assert verify_shards(url) == []

    storage.delete(f"{url}/index.json")
    with pytest.raises(DataError, match=r"--label txt: no sample has a member \.txt"):
        index_shards(url, Reading(label="txt"))
    assert index_shards(url).num_classes == 4  # and not what was found under the other label


def test_labels_that_are_not_as_asked_have_clear_messages(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    image = encode_png(random_images(1)[0])
    for text, message in (
        (b'{"id": 3}', r"a\.json: no field 'class'; it has id"),
        (b"[3", r"a\.json: b'\[3' is not a JSON object"),
        (b'{"class": "-3"}', r"a: its label \(json:class\) is '-3'; a class number"),
        (b'{"class": null}', r"a: its label \(json:class\) is None; a class number"),
    ):
        storage.publish(f"{url}/s.tar", tar.write_tar([("a", {"png": image, "json": text})]))
        with pytest.raises(DataError, match=message):
            index_shards(url, Reading(label="json:class"))


def test_what_is_no_image_is_not_a_format(tmp_path: Path) -> None:
    spoilt = [*samples(3), EncodedSample("bad", b"no image", "png", 0), EncodedSample("none", b"", "png", 0)]
    index = write_index(f"file://{tmp_path}", [write_shard(f"file://{tmp_path}", "a.tar", spoilt)])
    assert index.num_samples == 5
    assert dict(index.schema.formats) == {"png": 3}


def test_leaving_out_damaged_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}"
    for i in range(3):
        storage.publish(f"{url}/{i}.tar", shard_bytes(samples(5, f"{i}-")))
    storage.publish(f"{url}/1.tar", b"")
    assert [shard.name for shard in index_shards(url, leave_out_damaged=True).shards] == ["0.tar", "2.tar"]
    with caplog.at_level("INFO"):
        assert verify_shards(url) == []
    assert "left out when the set was indexed: 1.tar: an empty object" in caplog.text
    storage.publish(f"{url}/3.tar", shard_bytes(samples(5, "3-")))
    assert [problem.shard for problem in verify_shards(url)] == ["3.tar"]
    storage.publish(f"{url}/alone/1.tar", b"")
    with pytest.raises(DataError, match=r"1 of 1 shard can't be indexed:\n  1\.tar: an empty object"):
        index_shards(f"{url}/alone", leave_out_damaged=True)


def test_verify_finds_what_does_not_decode(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    bad = [*samples(3), EncodedSample("bad", b"no image", "png", 0)]
    write_index(url, [write_shard(url, "a.tar", bad)])
    (problem,) = verify_shards(url)
    assert "sample bad can't be decoded: not an image: it begins with b'no image'" in problem.what
    assert verify_shards(url, decoded=False) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([EncodedSample("a.b", b"x", "png")], "would end it at the dot"),
        ([EncodedSample("a", b"x", "png"), EncodedSample("b", b"x", "png"), EncodedSample("a", b"x", "png")], "unique"),
        ([EncodedSample("a", b"x", "png", 1), EncodedSample("b", b"x", "png")], "some samples have a label"),
    ],
)
def test_what_the_writer_refuses(tmp_path: Path, changed: list[EncodedSample], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shard(f"file://{tmp_path}", "a.tar", changed)


def test_walk_agrees_with_webdataset(tmp_path: Path) -> None:
    data = shard_bytes(samples(11))
    ours = [
        {member.extension: data[member.offset : member.offset + member.size] for member in members}
        for members in tar.walk(data, "s")
    ]
    theirs = list(tar.read_tar(io.BytesIO(data), "s"))
    assert ours == [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in theirs]
