"""index_shards on sets of others: nothing of theirs is touched, nothing is lost in silence, nothing hangs."""

import errno
import gzip
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.data import parts, tar
from ddpm_dist.data.build import Plan, ShardMaker, build, make_plan, run_in_processes
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import load_index
from ddpm_dist.data.order import Extent
from ddpm_dist.data.parts import PARTS_FOLDER
from ddpm_dist.data.reading import Reading
from ddpm_dist.data.sources import SourceOptions
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.data.writer import index_tar, shard_bytes
from ddpm_dist.errors import AccessError, ConfigError, DataError, DdpmDistError, NotFoundError, ShardError
from tests.data.others import image, put, tarred, with_size
from tests.data.test_writer import samples


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_the_users_stays(tmp_path: Path) -> None:
    """Folders `parts` and `index`, and names such as ours in them, can be anybody's."""
    url = f"file://{tmp_path}"
    put(url, [("0.png", image())], "parts/0.tar")
    put(url, [("1.png", image(1))])
    for name, data in (("parts/mine.bin", b"precious"), ("parts/000000.json", b"{}"), ("index/notes.txt", b"mine")):
        storage.publish(f"{url}/{name}", data)
    before = everything(tmp_path)
    assert index_shards(url).num_samples == 2
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"index.json", "index/0.tar.samples", "index/parts/0.tar.samples"}


@pytest.mark.parametrize("name", ["index.json", "index/0.tar.samples"])
def test_what_is_the_users_is_not_written_over(tmp_path: Path, name: str) -> None:
    url = put(f"file://{tmp_path}", [("0.png", image())])
    storage.publish(f"{url}/{name}", b'{"version": 2, "shards": []}')
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name}: is no .* of this project's.*nothing is overwritten"):
        index_shards(url)
    assert everything(tmp_path) == before


def folder_plan(tmp_path: Path, count: int = 40) -> Plan:
    (tmp_path / "src").mkdir()
    for i in range(count):
        (tmp_path / f"src/{i:02d}.png").write_bytes(image(i))
    settings = {"format": "png", "quality": 95, "channels": None, "shuffle_seed": 0, "skip_bad": False}
    return make_plan(
        "folder",
        SourceOptions((str(tmp_path / "src"),)),
        samples_per_shard=5,
        bytes_per_shard=1,
        **settings,  # type: ignore[arg-type]
    )


def killed(plan: Plan, url: str, after: int) -> None:
    """A make_shards that ends after so many shards."""

    class PowerCutError(Exception):
        pass

    def run(plan: Plan, url: str, numbers: list[int]):  # type: ignore[no-untyped-def]
        maker = ShardMaker(plan, url)
        for number in numbers[:after]:
            yield maker(number)
        raise PowerCutError

    with pytest.raises(PowerCutError):
        build(plan, url, run)


def finish(plan: Plan, url: str) -> int:
    return build(plan, url, lambda *arguments: run_in_processes(1, *arguments)).num_samples


@pytest.mark.parametrize("version", ["now", "0.1.0"])
def test_a_set_killed_half_way_is_no_set_of_others(tmp_path: Path, version: str) -> None:
    plan, url = folder_plan(tmp_path), f"file://{tmp_path}/set"
    killed(plan, url, 3)
    if version == "0.1.0":
        (tmp_path / "set" / PARTS_FOLDER).rename(tmp_path / "set/parts")
    with pytest.raises(ConfigError, match=r"folder .*src\) began this data set.*5 of 8 shards are missing.*the same"):
        index_shards(url)
    with pytest.raises(DataError, match=r"data\.url: .*index\.json isn't there yet: make_shards .*didn't finish"):
        load_index(url, "data.url")
    made: list[int] = []
    build(plan, url, lambda p, u, numbers: made.extend(numbers) or run_in_processes(1, p, u, numbers))
    assert made == [3, 4, 5, 6, 7]
    assert load_index(url).num_samples == 40
    assert verify_shards(url) == []
    assert set(storage.list_names(url)) == {
        "plan.json",
        "index.json",
        "index",
        *(f"shard-{i:06d}.tar" for i in range(8)),
    }


def test_an_index_of_a_half_made_set_is_not_complete(tmp_path: Path) -> None:
    """As 0.1.0's index_shards left it behind."""
    plan, url = folder_plan(tmp_path), f"file://{tmp_path}/set"
    killed(plan, url, 3)
    there = storage.read(f"{url}/plan.json")
    storage.delete(f"{url}/plan.json")
    index_shards(url)
    storage.publish(f"{url}/plan.json", there)
    assert [problem.what.split(":")[0] for problem in verify_shards(url)] == [
        "5 of its 8 shards, shard-000003.tar the first, are missing"
    ]
    with pytest.raises(ConfigError, match=r"lists 15 samples, but plan\.json has 40.*move index\.json away"):
        finish(plan, url)
    storage.delete(f"{url}/index.json")
    assert finish(plan, url) == 40
    assert verify_shards(url) == []


def test_a_whole_set_that_lost_its_index_gets_it_back(tmp_path: Path) -> None:
    plan, url = folder_plan(tmp_path), f"file://{tmp_path}/set"
    finish(plan, url)
    content = load_index(url).content_id
    storage.delete(f"{url}/index.json")
    assert index_shards(url).content_id == content
    storage.delete(f"{url}/index.json")
    put(url, [("x.png", image())], "shard-000002.tar")
    with pytest.raises(DataError, match=r"planned 40 samples here, but shard-000002\.tar has 1 samples and not 5"):
        index_shards(url)
    assert not storage.exists(f"{url}/index.json")


def test_a_shard_that_vanished_between_two_starts_is_made_again(tmp_path: Path) -> None:
    plan, url = folder_plan(tmp_path), f"file://{tmp_path}/set"
    killed(plan, url, 3)
    storage.delete(f"{url}/shard-000001.tar")
    assert finish(plan, url) == 40
    assert verify_shards(url) == []


def test_two_make_shards_at_one_url_make_one_set(tmp_path: Path) -> None:
    plan, url = folder_plan(tmp_path), f"file://{tmp_path}/set"

    def run(plan: Plan, url: str, numbers: list[int]):  # type: ignore[no-untyped-def]
        yield from run_in_processes(1, plan, url, numbers[:4])
        finish(plan, url)  # the other one is faster
        yield from run_in_processes(1, plan, url, numbers[4:])

    assert build(plan, url, run).num_samples == 40
    assert PARTS_FOLDER not in storage.list_names(url)
    assert verify_shards(url) == []


def test_what_0_1_0_had_indexed_is_indexed_anew(tmp_path: Path) -> None:
    """Its parts don't say under which label they were made."""
    url = put(f"file://{tmp_path}", [("0.cls", b"3"), ("0.png", image())])
    index_shards(url)
    wanted = storage.read(f"{url}/index.json")
    storage.delete(f"{url}/index.json")
    written, _ = index_tar("0.tar", storage.read(f"{url}/0.tar"), Reading(label="txt"))
    storage.publish(f"{url}/parts/000000.json", json.dumps(asdict(written)).encode())
    storage.publish(f"{url}/parts/label", b"txt")
    index_shards(url)
    assert storage.read(f"{url}/index.json") == wanted
    assert storage.list_names(f"{url}/parts") == ["label"]


def test_a_plan_of_somebody_else_is_not_ours(tmp_path: Path) -> None:
    plan, url = folder_plan(tmp_path), put(f"file://{tmp_path}/set", [("0.png", image())])
    for data in (b"Buy milk", b"[1]", b'{"kind": "trip"}', b"[" * 100_000):
        storage.publish(f"{url}/plan.json", data)
        with pytest.raises(ConfigError, match="not empty; nothing is overwritten"):
            finish(plan, url)
    assert index_shards(url).num_samples == 1


def test_shards_that_change_or_vanish_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}"
    for i in range(3):
        storage.publish(f"{url}/{i}.tar", shard_bytes(samples(3, f"{i}-")))
    original = storage.read

    def read(place: str, *rest: float) -> bytes:
        if place.endswith("/0.tar"):
            storage.delete(place)
        if place.endswith("/1.tar"):
            storage.publish(place, shard_bytes(samples(20, "other")))
        return original(place, *rest)

    monkeypatch.setattr(storage, "read", read)
    with pytest.raises(DataError, match=r"0\.tar: vanished after it was listed\n  1\.tar: changed while it was read"):
        index_shards(url)


FIRST = 512 + 512 * -(-len(image()) // 512)


@pytest.mark.parametrize("size", [-512, -(2**62), 2**62, 2**80, 8**11 - 1])
@pytest.mark.parametrize("header", [0, FIRST])
def test_impossible_sizes_are_errors_at_once(size: int, header: int) -> None:
    data = with_size(tarred([("0.png", image()), ("1.png", image(1))]), header, size)
    with pytest.raises(ShardError, match=r"s\.tar: (altered|truncated|not a whole tar)"):
        tar.walk(data, "s.tar")


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE, b"q"]
)
@pytest.mark.parametrize("size", [-512, 2**40, 2**70])
def test_impossible_sizes_of_headers_that_tarfile_reads_itself(kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("x")
    info.type = kind
    data = with_size(info.tobuf() + tarred([("0.png", image())]), 0, size)
    with pytest.raises(ShardError):
        tar.walk(data, "s.tar")


@pytest.mark.parametrize("value", ["-512", "9" * 30, "9" * 5000, "x", "1e9", "1.5"])
@pytest.mark.parametrize("field", ["size", "mtime", "uid", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.realsize"])
def test_numbers_out_of_range_in_pax(field: str, value: str) -> None:
    data = tarred([("0.png", image()), ("1.png", image(1))], format=tarfile.PAX_FORMAT, pax_headers={field: value})
    info = tarfile.TarInfo("2.png")
    info.pax_headers = {field: value}
    local = info.create_pax_header(dict(info.get_info(), size=0), "utf-8")
    for altered in (data, local + data):
        try:
            assert len(tar.walk(altered, "s.tar")) in (2, 3)
        except ShardError:
            pass


def test_a_chain_of_headers_is_no_endless_recursion() -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    with pytest.raises(ShardError, match="not a whole tar"):
        tar.walk(info.tobuf() * 3000 + tarred([("0.png", image())]), "s.tar")


def test_names_that_are_not_utf8_are_named() -> None:
    data = bytearray(tarred([("na_ve.png", image())]))
    data[2] = 0xEF  # naïve in Latin-1
    with pytest.raises(ShardError, match=r"s\.tar: a file's name isn't UTF-8: b'na\\xefve\.png'"):
        tar.walk(with_size(bytes(data), 0, len(image())), "s.tar")


@pytest.mark.parametrize("names", [("0.jpg", "0.jpg"), ("0.jpg", "0.JPG"), ("0.txt", "0.txt")])
def test_members_that_stand_twice_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    url = f"file://{tmp_path}"
    put(url, [("0.png", image()), *((name, image(i, "JPEG")) for i, name in enumerate(names))])
    with pytest.raises(DataError, match=r"0\.tar: 0\.(jpg|JPG|txt): sample 0 has a member \.(jpg|txt) twice"):
        index_shards(url)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n", "a pointer of Git LFS"),
        (b"\x1f\x8b" + bytes(2000), "compressed by gzip"),
        (b"PK\x03\x04" + bytes(2000), "a zip"),
        (b"<html>404</html>" * 100, "not a whole tar"),
        (bytes(1024), None),
    ],
)
def test_what_is_found_in_a_shards_place(data: bytes, message: str | None) -> None:
    if message is None:
        assert tar.walk(data, "s.tar") == []
        return
    with pytest.raises(ShardError, match=message):
        tar.walk(data, "s.tar")


def test_what_belongs_to_no_sample_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Leftovers of macOS make no samples; links and the rest drop out as in WebDataset, but not in silence."""
    url = f"file://{tmp_path}"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:

        def add(path: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(path)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data))

        for i in range(2):
            add(f"d/._{i}.png", b"\0\5\x16\7")
            add(f"d/{i}.png", image(i))
        add("d/.DS_Store", b"x")
        add("__MACOSX/d/0.png", b"x")
        add("d/2.png", kind=tarfile.LNKTYPE, target="d/1.png")
        add("d/3.png", kind=tarfile.SYMTYPE, target="1.png")
        add("d/README", b"hello")
        add("d/fifo", kind=tarfile.FIFOTYPE)
    storage.publish(f"{url}/0.tar", out.getvalue())
    storage.publish(f"{url}/._0.tar", b"\0\5\x16\7")
    with caplog.at_level(logging.INFO):
        index = index_shards(url)
    assert index.num_samples == 2
    assert dict(index.schema.formats) == {"png": 2}
    for what in (
        "1 hidden file, such as ._0.tar",
        "4 hidden files, such as 0.tar: d/._0.png",
        "1 hard link, such as 0.tar: d/2.png",
        "1 symbolic link, such as 0.tar: d/3.png",
        "1 extensionless file, such as 0.tar: d/README",
        "1 special file, such as 0.tar: d/fifo",
    ):
        assert f"left out: {what}" in caplog.text
    assert verify_shards(url) == []


def test_an_unsorted_tar_says_how_to_sort_it(tmp_path: Path) -> None:
    url = put(f"file://{tmp_path}", [("0.png", image()), ("1.png", image()), ("0.cls", b"1"), ("1.cls", b"2")])
    with pytest.raises(DataError, match=r"the key 0 stands twice, with other files between.*tar --sort=name"):
        index_shards(url)


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


def test_an_index_that_is_json_of_another_kind(tmp_path: Path) -> None:
    url = put(f"file://{tmp_path}", [("0.png", image())])
    index_shards(url)
    whole = json.loads(storage.read(f"{url}/index.json"))
    for changed in (
        b"version https://git-lfs.github.com/spec/v1\n",
        b"[" * 200_000,
        json.dumps({**whole, "shards": [["0.tar", "x", 1, "a", 2, "b"]]}).encode(),
        json.dumps({**whole, "shards": [["0.tar", -1, 1, "a", 2, "b"]]}).encode(),
        json.dumps({**whole, "schema": []}).encode(),
        json.dumps({**whole, "num_samples": 10**400}).encode()[:-5],
    ):
        storage.publish(f"{url}/index.json", changed)
        with pytest.raises(DdpmDistError, match=r"index\.json: (not an index|altered)"):
            load_index(url)


# What a sample holds, and what of it is meant.


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


def labelled(url: str, labels: list[bytes | None], name: str = "0.tar") -> str:
    put(
        url,
        [
            m
            for i, v in enumerate(labels)
            for m in (*([(f"{i}.cls", v)] if v is not None else []), (f"{i}.png", image(i)))
        ],
        name,
    )
    return url


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([b"1", None], r"some samples have a label, others \(1 of 2\) don't; --label none"),
        ([b"-1", b"-1"], r"0\.tar: 0: its label \(cls\) is '-1'; a class number .* --label none leaves labels out"),
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


def test_the_index_of_a_set_that_can_not_be_written_to(tmp_path: Path) -> None:
    url, home = f"file://{tmp_path}/set", f"file://{tmp_path}/index"
    labelled(url, [b"dog", b"cat"] * 12)
    storage.publish(f"{url}/index.json", b'{"version": 2}')  # of another tool
    before = everything(tmp_path / "set")
    index = index_shards(url, at=home)
    assert everything(tmp_path / "set") == before
    assert sorted(everything(tmp_path / "index")) == ["index.json", "index/0.tar.samples"]
    assert load_index(url, at=home).content_id == index.content_id
    assert verify_shards(url, at=home) == []
    assert ShardReader(load_index(url, at=home)).sample(0, 1).image == image(1)
    with pytest.raises(DataError, match=r"index\.json: not an index"):
        load_index(url)


def test_photos_that_lie_on_their_side_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    out = io.BytesIO()
    Image.new("RGB", (8, 4)).save(out, "JPEG", exif=exif)
    url = put(f"file://{tmp_path}", [("0.jpg", out.getvalue()), ("1.jpg", image(form="JPEG"))])
    with caplog.at_level(logging.INFO):
        assert index_shards(url).schema.max_size == (8, 8)
    assert "trained on as they lie (ddpm-shards make turns them): 1 photo, such as 0.tar: 0" in caplog.text


def test_links_below_a_set_are_followed_and_what_can_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"file://{tmp_path}/elsewhere", [("0.png", image())])
    put(f"file://{tmp_path}/set", [("1.png", image(1))], "plain/1.tar")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/2.tar").symlink_to(tmp_path / "elsewhere/0.tar")
    (tmp_path / "set/plain/loop").symlink_to(tmp_path / "set")
    url = f"file://{tmp_path}/set"
    assert storage.list_objects(url).keys() == {"2.tar", "linked/0.tar", "plain/1.tar"}
    (tmp_path / "set/3.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"1 of 4 shards can't be indexed:\n  3\.tar: vanished"):
        index_shards(url)
    (tmp_path / "set/3.tar").unlink()
    index = index_shards(url)
    assert [shard.name for shard in index.shards] == ["2.tar", "linked/0.tar", "plain/1.tar"]
    assert verify_shards(url) == []

    scan = os.scandir

    def without_rights(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).rstrip("/").endswith("plain"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    with pytest.raises(AccessError, match="Permission denied"):
        storage.list_objects(url)
