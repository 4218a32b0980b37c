"""index_shards on sets of others: nothing of theirs is touched, nothing is lost in silence, nothing hangs."""

import errno
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.data.build import Plan, ShardMaker, build, make_plan, run_in_processes
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import KEYS, LEFT_OUT, LYING, load_index
from ddpm_dist.data.loader import Loader
from ddpm_dist.data.parts import PARTS_FOLDER
from ddpm_dist.data.reading import Reading
from ddpm_dist.data.sources import SourceOptions
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.data.writer import index_tar, shard_bytes
from ddpm_dist.errors import AccessError, ConfigError, DataError, DdpmDistError
from tests.data.others import image, labelled, put
from tests.data.small_sets import config, write_set
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


@pytest.mark.parametrize("names", [("0.jpg", "0.jpg"), ("0.jpg", "0.JPG"), ("0.txt", "0.txt")])
def test_members_that_stand_twice_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    url = f"file://{tmp_path}"
    put(url, [("0.png", image()), *((name, image(i, "JPEG")) for i, name in enumerate(names))])
    with pytest.raises(DataError, match=r"0\.tar: 0\.(jpg|JPG|txt): sample 0 has a member \.(jpg|txt) twice"):
        index_shards(url)


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
    caplog.clear()
    for rank in range(2):  # the index knows: nothing is looked for, and one rank says it
        loader = Loader(config(url, batch=2), rank, 2)
        next(loader.batches(0))
        loader.close()
    assert caplog.text.count(f"1 of 2 images of {url} aren't upright by their EXIF orientation") == 1
    assert LYING in load_index(url).about
    assert LYING not in load_index(build_from(url, f"{url}-made")).about


def build_from(url: str, out: str) -> str:
    """A set made anew of one that has an index."""
    plan = make_plan(
        "webdataset", SourceOptions((url,)), format="png", quality=95, channels=None, shuffle_seed=None,
        skip_bad=False, samples_per_shard=2, bytes_per_shard=2**26,
    )  # fmt: skip
    return build(plan, out, partial(run_in_processes, 1)).url


def test_what_the_index_of_an_input_says_is_not_said_of_the_set_that_is_made_of_it(tmp_path: Path) -> None:
    url = put(f"file://{tmp_path}/set", [("a.b.0.png", image()), ("a.b.1.png", image(1))], "train.tar")
    put(url, [("2.png", image(2))], "shard-000000.tar")
    index_shards(url, Reading(keys="last-dot", include=("train*",)))
    assert load_index(url).about.keys() == {LEFT_OUT, KEYS}
    made = build_from(url, f"file://{tmp_path}/made")
    assert load_index(made).about == {}
    assert verify_shards(made) == []


def test_a_shard_that_stands_there_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}"
    for name in ("0.tar", "0 (1).tar", "1.tar"):
        put(url, [("0.png", image()) if name[0] == "0" else ("1.png", image(1))], name)
    assert index_shards(url).num_samples == 3
    assert "index_shards: 0.tar is 0 (1).tar once more, byte for byte (--exclude GLOB)" in caplog.text
    assert "1.tar is" not in caplog.text


def test_members_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = put(f"file://{tmp_path}", [m for i in range(3) for m in ((f"{i}.cls", b"1"), (f"{i}.json", b'{"a": 2}'),
              (f"{i}.png", image(i)), (f"{i}.txt", b"a cat"))])  # fmt: skip
    with pytest.raises(ConfigError, match=r"--label json: which field \(a\)\? Write --label json:FIELD"):
        index_shards(url, Reading(label="json"))
    for reading, count, example in (
        (Reading(), 6, "0.json, 0.txt"), (Reading(label=".json:a"), 6, "0.cls, 0.txt"), (Reading(label="none"), 9, ""),
    ):  # fmt: skip
        caplog.clear()
        index_shards(url, reading)
        assert f"left out: {count} other members, such as 0.tar: {example}" in caplog.text
        storage.delete(f"{url}/index.json")


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


def test_sets_without_doubt_keep_the_indexes_of_0_1_0(tmp_path: Path) -> None:
    url, foreign = f"file://{tmp_path}/own", f"file://{tmp_path}/others"
    index = write_set(url, [5, 9, 2], extension="npy")
    assert index.content_id == "17389b21f03aa66316e92d62843d71c1"
    assert hashlib.sha256(storage.read(f"{url}/index.json")).hexdigest()[:16] == "d5aee0ff326dd3a1"
    for shard in index.shards:
        storage.publish(f"{foreign}/sub/{shard.name}", storage.read(f"{url}/{shard.name}"))
    assert index_shards(foreign).content_id == "4b2f4392576bff2f05eaf7a03f648e90"
    assert hashlib.sha256(storage.read(f"{foreign}/index.json")).hexdigest()[:16] == "f280ac97f48bb96e"
