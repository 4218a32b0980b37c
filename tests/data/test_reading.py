"""What a sample of others holds, and what of it is meant: image, key, class. Asked where it isn't clear."""

import gzip
import logging
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.data import parts
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import load_index
from ddpm_dist.data.order import Extent
from ddpm_dist.data.reading import Reading
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.errors import ConfigError, DataError, DdpmDistError, NotFoundError
from tests.data.others import image, labelled, put, tarred


def test_an_image_among_several_is_asked_for(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    put(
        url,
        [
            m
            for i in range(3)
            for m in ((f"{i}.jpg", image(i, "JPEG", (16, 16))), (f"{i}.png", image(9 + i, size=(4, 4))))
        ],
    )
    with pytest.raises(ConfigError, match=r"0\.tar: sample 0 holds \.jpg, \.png: 2 images; .* --image jpg"):
        index_shards(url)
    with pytest.raises(ConfigError, match=r"2 images that match --image \*"):
        index_shards(url, Reading(image="*"))
    for asked, size in (("jpg", 16), ("PNG", 4), (".png", 4), ("*.jpg", 16)):
        index = index_shards(url, Reading(image=asked))
        assert (index.num_samples, index.schema.max_size) == (3, (size, size))
        assert verify_shards(url) == []
        storage.delete(f"{url}/index.json")
    with pytest.raises(DataError, match=r"none of 3 samples has an image that can be read; 0\.tar: 0 \(\.jpg, \.png\)"):
        index_shards(url, Reading(image="webp"))


def test_an_image_beside_an_embedding_is_asked_for(tmp_path: Path) -> None:
    url = put(f"file://{tmp_path}", [("0.npy", b"\x93NUMPY\1\0"), ("0.webp", image(0, "WEBP"))])
    with pytest.raises(ConfigError, match=r"sample 0 holds \.npy, \.webp: 2 images"):
        index_shards(url)
    assert dict(index_shards(url, Reading(image="webp")).schema.formats) == {"webp": 1}
    assert verify_shards(url) == []


def test_keys_with_dots_do_not_melt(tmp_path: Path) -> None:
    members = [m for i in range(4) for m in ((f"d.1/a.b.{i}.cls", b"%d" % i), (f"d.1/a.b.{i}.jpg", image(i, "JPEG")))]
    url = put(f"file://{tmp_path}", members)
    with pytest.raises(
        ConfigError, match=r"sample d\.1/a holds \.b\.0\.cls, \.b\.0\.jpg, .*--keys last-dot.*--image b\.0\.jpg"
    ):
        index_shards(url)
    index = index_shards(url, Reading(keys="last-dot"))
    assert (index.num_samples, index.num_classes) == (4, 4)
    loaded = ShardReader(load_index(url)).load(Extent(0, 0, 4))
    assert [(loaded[i].key, loaded[i].label) for i in range(4)] == [(f"d.1/a.b.{i}", i) for i in range(4)]
    assert verify_shards(url) == []


def test_extensions_in_several_parts(tmp_path: Path) -> None:
    members = [
        m
        for i in range(4)
        for m in ((f"{i:04d}.input.jpg", image(i, "JPEG")), (f"{i:04d}.target.jpg", image(i + 9, "JPEG")))
    ]
    url = put(f"file://{tmp_path}", members)
    with pytest.raises(ConfigError, match=r"sample 0000 holds \.input\.jpg, \.target\.jpg\..*--image input\.jpg"):
        index_shards(url)
    for asked in ("input.jpg", "*input*"):
        index = index_shards(url, Reading(image=asked))
        assert ShardReader(index).sample(0, 3).image == image(3, "JPEG")
        assert verify_shards(url) == []
        storage.delete(f"{url}/index.json")


def test_samples_without_an_image_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    only_json = put(f"file://{tmp_path}/a", [(f"{i}.json", b"{}") for i in range(3)])
    with pytest.raises(DataError, match=r"none of 3 samples has an image that can be read; 0\.tar: 0 \(\.json\)"):
        index_shards(only_json)
    some = put(f"file://{tmp_path}/b", [("0.png", image()), ("1.json", b"{}"), ("1.txt", b"x"), ("2.png", b"")])
    with caplog.at_level(logging.INFO):
        assert index_shards(some).num_samples == 3
    assert "no image: 1 imageless sample, such as 0.tar: 1 (.json, .txt)" in caplog.text
    assert [problem.what for problem in verify_shards(some)] == [
        "sample 1 has no image; it holds .json, .txt",
        "sample 2 can't be decoded: empty: a file of no bytes, or a sample without an image",
    ]
    empty = put(f"file://{tmp_path}/c", [])
    with pytest.raises(DataError, match="1 shard, and no sample in them"):
        index_shards(empty)


@pytest.mark.parametrize(
    ("form", "extension"), [("AVIF", "avif"), ("JPEG", "jfif"), ("JPEG", "jpe"), ("JPEG", "JPEG"), ("PNG", "PNG")]
)
def test_extensions_of_images(tmp_path: Path, form: str, extension: str) -> None:
    url = put(f"file://{tmp_path}", [(f"0.{extension}", image(form=form))])
    assert dict(index_shards(url).schema.formats) == {form.lower(): 1}
    assert verify_shards(url) == []


def test_a_set_whose_only_images_are_damaged_is_none(tmp_path: Path) -> None:
    flipped = bytearray(image())
    flipped[60] ^= 4
    url = put(f"file://{tmp_path}", [("0.png", bytes(flipped)), ("1.png", b"text")])
    with pytest.raises(
        DataError, match=r"none of 2 .* can be read; 0\.tar: 0: corrupt: the chunk b'IDAT' at byte 33 differs"
    ):
        index_shards(url)


def test_compressed_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}"
    storage.publish(f"{url}/0.tar.gz", gzip.compress(tarred([("0.png", image())])))
    with pytest.raises(NotFoundError, match=r"no \.tar is there, but 0\.tar\.gz; .* gunzip"):
        index_shards(url)
    put(url, [("1.png", image())], "1.tar")
    with caplog.at_level(logging.INFO):
        assert index_shards(url).num_samples == 1
    assert "left out: 1 compressed shard, such as 0.tar.gz" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([b"1", None], r"some samples have a label, others \(1 of 2\) don't; --label none"),
        ([b"-1", b"-1"], r"0\.tar: 0: its label \(cls\) is '-1'; a class number .* --label none takes no labels"),
        ([b"cat", b"7"], r"labels are names \(cat\) and numbers \(7\)"),
        ([b"", b"1"], r"its label \(cls\) is ''"),
        ([b"\xff", b"1"], r"its label \(cls\) is b'\\xff'"),
        ([b"a cat\non a mat", b"1"], r"its label \(cls\) is 'a cat"),
        (
            [b"5", b"3000"],
            r"labels: 2 numbers \(5, 3000\) up to 3000: --sparse-labels renumber makes 2 .* keep makes 3001",
        ),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: list[bytes | None], message: str) -> None:
    url = labelled(f"file://{tmp_path}", labels)
    with pytest.raises(DdpmDistError, match=message):
        index_shards(url)
    index = index_shards(url, Reading(label="none"))
    assert (index.num_samples, index.num_classes) == (2, None)
    assert verify_shards(url) == []


def labels_of(url: str) -> list[int]:
    index = load_index(url)
    reader = ShardReader(index)
    return [reader.sample(s, i).label for s, info in enumerate(index.shards) for i in range(info.samples)]


def test_class_names_are_numbered_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}"
    labelled(url, [b"dog", b"cat\n"], "0.tar")
    labelled(url, [b"eel", b"cat", b"ape"], "1.tar")
    index = index_shards(url)
    assert index.schema.class_names == load_index(url).schema.class_names == ("ape", "cat", "dog", "eel")
    assert labels_of(url) == [2, 1, 3, 1, 0]
    assert verify_shards(url) == []
    wanted = storage.read(f"{url}/index.json")

    storage.delete(f"{url}/index.json")  # the same after a power cut when some tables have their numbers
    original = storage.create
    monkeypatch.setattr(
        storage, "create", lambda place, data: not place.endswith("index.json") and original(place, data)
    )
    monkeypatch.setattr(parts, "delete_parts", lambda place: None)
    index_shards(url)
    monkeypatch.undo()
    index_shards(url)
    assert storage.read(f"{url}/index.json") == wanted
    assert verify_shards(url) == []


def test_names_in_one_shard_and_numbers_in_another(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    labelled(url, [b"3", b"4"], "0.tar")
    labelled(url, [b"cat", b"dog"], "1.tar")
    with pytest.raises(ConfigError, match=r"labels are names in 1\.tar \(cat\), numbers in 0\.tar; --label none"):
        index_shards(url)


def test_labels_with_a_mark_at_their_start_or_white_space(tmp_path: Path) -> None:
    url = labelled(f"file://{tmp_path}", [b"\xef\xbb\xbf1\r\n", b" 0 "])
    assert index_shards(url).num_classes == 2
    assert labels_of(url) == [1, 0]


@pytest.mark.parametrize("label", [b"[0, 1]", b'{"a": 1}', b"a\nb", b"1\0", "1".encode("utf-16"), b""])
def test_what_is_neither_number_nor_name(tmp_path: Path, label: bytes) -> None:
    url = labelled(f"file://{tmp_path}", [label, b"0"])
    with pytest.raises(DataError, match=r"its label \(cls\) is .*; a class number .* is wanted; --label none takes"):
        index_shards(url)


def test_names_that_look_the_same(tmp_path: Path) -> None:
    url = labelled(f"file://{tmp_path}", ["\u00e9".encode(), "e\u0301".encode()])
    with pytest.raises(ConfigError, match="look the same but aren't"):
        index_shards(url)


def test_texts_about_images_are_no_classes(tmp_path: Path) -> None:
    url = put(
        f"file://{tmp_path}",
        [m for i in range(120) for m in ((f"{i}.png", image()), (f"{i}.txt", b"a cat, no. %d" % i))],
    )
    with pytest.raises(ConfigError, match=r"labels: 120 different ones for 120 samples .* are no classes"):
        index_shards(url, Reading(label="txt"))


def test_sparse_numbers_are_kept_or_renumbered(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    labelled(url, [b"3000", b"5"], "0.tar")
    labelled(url, [b"17", b"5"], "1.tar")
    assert index_shards(url, Reading(sparse="keep")).num_classes == 3001
    assert labels_of(url) == [3000, 5, 17, 5]
    storage.delete(f"{url}/index.json")
    assert index_shards(url, Reading(sparse="renumber")).schema.class_names == ("5", "17", "3000")
    assert labels_of(url) == [2, 0, 1, 0]
    assert verify_shards(url) == []


@pytest.mark.parametrize(
    "text",
    ["file,class\nd/0.png,cat\nd/1.png,dog\n", "key,class\nd/0,cat\nd/1,dog\n", '{"d/0.png": "cat", "d/1.png": "dog"}'],
)
def test_labels_from_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / ("labels.json" if text.startswith("{") else "labels.csv")
    file.write_text(text)
    url = put(f"file://{tmp_path}/set", [("d/0.png", image()), ("d/1.png", image(1))])
    index = index_shards(url, Reading(labels=str(file)))
    assert index.schema.class_names == ("cat", "dog")
    assert labels_of(url) == [0, 1]
    storage.delete(f"{url}/index.json")
    file.write_text(text.replace("cat", "eel"))  # another question than before
    assert index_shards(url, Reading(labels=str(file))).schema.class_names == ("dog", "eel")
    storage.delete(f"{url}/index.json")
    file.write_text(text.replace("d/1", "d/7"))
    with pytest.raises(ConfigError, match=r"labels\..*: has no class for d/1\.png \(in 0\.tar\)"):
        index_shards(url, Reading(labels=str(file)))


@pytest.mark.parametrize(
    "value", ["Infinity", "NaN", "1e400", "3.7", "-0.5", "-1", "true", "9" * 400, "[1]", "{}", '""']
)
def test_numbers_in_json_that_are_no_class(tmp_path: Path, value: str) -> None:
    url = put(f"file://{tmp_path}", [("0.json", b'{"class": %s}' % value.encode()), ("0.png", image())])
    with pytest.raises(DataError, match=r"0\.tar: 0: its label \(json:class\) is .*; a class"):
        index_shards(url, Reading(label="json:class"))


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff\xfe", b"[1]", b"3", b"9" * 5000])
def test_json_that_is_none(tmp_path: Path, text: bytes) -> None:
    url = put(f"file://{tmp_path}", [("0.json", text), ("0.png", image())])
    with pytest.raises(DataError, match=r"0\.tar: 0\.json: .* is not a JSON object"):
        index_shards(url, Reading(label="json:class"))


@pytest.mark.parametrize("value", ["3", "3.0", '"3"', '"3.0"', '" 3\\n"'])
def test_whole_numbers_in_any_form(tmp_path: Path, value: str) -> None:
    url = put(f"file://{tmp_path}", [("0.json", b'{"class": %s}' % value.encode()), ("0.png", image())])
    assert index_shards(url, Reading(label="json:class")).num_classes == 4
