"""Folders, zips and tars of images as they lie around: parts, classes, leftovers, links. Nothing is guessed."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.reading import Reading
from ddpm_dist.data.sources import Source, SourceOptions, open_source
from ddpm_dist.data.sources.layout import EXTENSIONS
from ddpm_dist.data.sources.splits import split_of
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.errors import ConfigError, DataError
from tests.data.small_sets import random_images

PNG = encode_png(random_images(1)[0])


def opened(kind: str, *inputs: object, **options: object) -> Source:
    return open_source(kind, SourceOptions(tuple(str(i) for i in inputs), **options))  # type: ignore[arg-type]


def as_folder(root: Path, files: Mapping[str, bytes]) -> tuple[str, Path]:
    for name, data in files.items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(data)
    return "folder", root / "in"


def as_zip(root: Path, files: Mapping[str, bytes]) -> tuple[str, Path]:
    with zipfile.ZipFile(root / "in.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return "zip", root / "in.zip"


def as_tar(root: Path, files: Mapping[str, bytes]) -> tuple[str, Path]:
    (root / "in.tar").write_bytes(tar_of(files.items()))
    return "tar", root / "in.tar"


def tar_of(members: Sequence[tuple[str, bytes]] | object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:  # type: ignore[attr-defined]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(params=[as_folder, as_zip, as_tar])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """Lays files down, as a folder, a zip, a tar; gives (kind, input)."""
    return lambda *names, **others: request.param(
        tmp_path, {**dict.fromkeys(names, PNG), **{name.replace("__", "."): data for name, data in others.items()}}
    )


def labels(source: Source) -> dict[str, int | None]:
    return {source[i].name: source[i].label for i in range(len(source))}


SPLIT = ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")


def test_parts_side_by_side_are_asked_for_and_are_no_classes(put: Callable[..., tuple[str, Path]]) -> None:
    kind, place = put(*SPLIT)
    for asked in (None, "none"):
        with pytest.raises(DataError, match=r"parts of a set side by side \(train, val\).*--split train or val"):
            opened(kind, place, labels=asked)
    source = opened(kind, place, split="val")
    assert labels(source) == {"val/cat/2.png": 0, "val/dog/3.png": 1}
    assert source.class_names == ("cat", "dog")
    assert source.notes[:2] == ("--split val: 2 of 4 images", "2 classes: cat, dog (the folders at *)")
    assert list(labels(opened(kind, place, split="all")).values()) == [0, 1, 0, 1]
    assert list(labels(opened(kind, place, split="all", labels="none")).values()) == [None] * 4
    assert labels(opened(kind, place, include=("train/*",))) == {"train/cat/0.png": 0, "train/dog/1.png": 1}
    assert opened(kind, place, labels="folders").class_names == ("train", "val")
    with pytest.raises(DataError, match=r"--split test: .* has train, val"):
        opened(kind, place, split="test")


def test_one_class_has_one_number_in_all_parts(put: Callable[..., tuple[str, Path]]) -> None:
    kind, place = put(*SPLIT[:2], "train/eel/4.png", "validation/dog/5.png", "validation/eel/6.png")
    source = opened(kind, place, split="val")
    assert labels(source) == {"validation/dog/5.png": 1, "validation/eel/6.png": 2}
    assert source.class_names == ("cat", "dog", "eel")


def test_a_class_that_the_training_part_lacks_is_refused(tmp_path: Path) -> None:
    kind, place = as_folder(tmp_path, dict.fromkeys([*SPLIT, "val/eel/4.png"], PNG))
    with pytest.raises(DataError, match=r"val has a class eel, which the training part hasn't"):
        opened(kind, place, split="val")
    assert opened(kind, place, split="train").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bus/0.png", "train/1.png", "tram/2.png"], ("bus", "train", "tram")),
        (["set/bus/0.png", "set/train/1.png"], ("bus", "train")),
        (["train0/a/0.png", "train0/b/0.png"], ("a", "b")),
        (["test/a/0.png", "test/b/0.png"], ("a", "b")),
    ],
)
def test_what_is_no_choice_is_not_asked_for(tmp_path: Path, names: list[str], expected: tuple[str, ...]) -> None:
    assert opened(*as_folder(tmp_path, dict.fromkeys(names, PNG))).class_names == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/0.png", "test/1.png"], "is test a class beside cat, or a part of the set"),
        (["trainA/0.png", "trainB/1.png", "testA/2.png", "testB/3.png"], r"side by side \(testA, testB, trainA"),
        (["train_01.png", "train_02.png", "test_01.png"], r"side by side \(test_01.png, train_01.png"),
    ],
)
def test_more_of_what_is_asked(tmp_path: Path, names: list[str], message: str) -> None:
    kind, place = as_folder(tmp_path, dict.fromkeys(names, PNG))
    with pytest.raises(DataError, match=message):
        opened(kind, place)


def test_parts_by_name(tmp_path: Path) -> None:
    kind, place = as_folder(tmp_path, dict.fromkeys(["trainA/0.png", "trainB/1.png", "testA/2.png"], PNG))
    with pytest.raises(DataError, match=r"--split train: .* has trainA, trainB; name one"):
        opened(kind, place, split="train")
    assert list(labels(opened(kind, place, split="trainB"))) == ["trainB/1.png"]
    with pytest.raises(DataError, match=r"--split train: .* has no parts"):
        opened(*as_zip(tmp_path, {"a/0.png": PNG, "b/0.png": PNG}), split="train")
    for name, part in {
        "train": "train", "Validation": "val", "val2017": "val", "test-00000-of-00003.parquet": "test",
        "train_images": "train", "trains": None, "training wheels": None, "test-tube": None, "dev": "val",
    }.items():  # fmt: skip
        assert split_of(name) == part


def test_a_stray_image_beside_class_folders_is_asked_about(put: Callable[..., tuple[str, Path]]) -> None:
    kind, place = put("cat/0.png", "dog/1.png", "overview.png")
    with pytest.raises(DataError, match=r"overview.png lies in no class folder \(1 of 3 images\)"):
        opened(kind, place)
    for choice in ({"exclude": ("overview.png",)}, {"include": ("*/*",)}):
        source = opened(kind, place, **choice)
        assert labels(source) == {"cat/0.png": 0, "dog/1.png": 1}
        assert "left out: 1 by --include and --exclude (overview.png)" in source.notes
    assert list(labels(opened(kind, place, labels="none")).values()) == [None] * 3


EDM = ("00000/img0.png", "00000/img1.png", "00001/img2.png")


@pytest.mark.parametrize("prefix", ["", "edm/"])
def test_dataset_json_gives_the_labels(put: Callable[..., tuple[str, Path]], prefix: str) -> None:
    """As EDM's and StyleGAN's dataset_tool.py write it; its folders of 1,000 images are no classes."""
    meta = json.dumps({"labels": [[name, number] for name, number in zip(EDM, (6, 9, 2), strict=True)]}).encode()
    kind, place = put(*(prefix + name for name in EDM), **{f"{prefix}dataset__json": meta})
    source = opened(kind, place)
    assert list(labels(source).values()) == [6, 9, 2]
    assert source.notes[0].startswith(f"10 classes (3 of them occur): 2, 6, 9 (by {prefix}dataset.json")
    assert list(labels(opened(kind, place, labels="folders")).values()) == [0, 0, 1]
    assert list(labels(opened(kind, place, labels="none")).values()) == [None] * 3


def test_dataset_json_without_labels_and_damaged(tmp_path: Path) -> None:
    files = dict.fromkeys(EDM, PNG)
    source = opened(*as_zip(tmp_path, files | {"dataset.json": b'{"labels": null}'}))
    assert list(labels(source).values()) == [None] * 3
    for meta, message in (
        (b'{"labels": [["00000/img0.png", 1]]}', r"dataset.json .*00000/img1.png has no class there"),
        (b'{"labels": [["00000/img0.png", [0.1, 0.9]]]}', "has no class there"),
        (b'{"labels": [1, 2]}', "a list of"),
        (b'{"labels"', "dataset.json .*--labels folders"),
        (b"[" * 100_000, "dataset.json"),
    ):
        with pytest.raises(DataError, match=message):
            opened(*as_zip(tmp_path, files | {"dataset.json": meta}))


@pytest.mark.parametrize(
    ("folders", "numbers", "names"),
    [
        (("0", "1", "2"), [0, 1, 2], None),
        (("00", "01", "02"), [0, 1, 2], None),
        (("1", "2", "10"), [0, 2, 1], ("1", "2", "10")),  # the files are in the order 1, 10, 2
        (("3", "7", "9"), [0, 1, 2], ("3", "7", "9")),
        (("0", "1", "-1"), [0, 1, 2], ("-1", "0", "1")),
    ],
)
def test_numeric_folders_are_numbers_from_0_on_or_names(
    tmp_path: Path, folders: tuple[str, ...], numbers: list[int], names: tuple[str, ...] | None
) -> None:
    source = opened(*as_folder(tmp_path, {f"{name}/a.png": PNG for name in folders}))
    assert list(labels(source).values()) == numbers
    assert source.class_names == names


def test_photos_and_masks_under_the_same_names_are_asked_about(put: Callable[..., tuple[str, Path]]) -> None:
    kind, place = put("0.jpg", "0.png", "1.jpg", "1.png")
    with pytest.raises(DataError, match=r"\(0.jpg and 0.png\): are some of them masks\? --include '\*.jpg' or"):
        opened(kind, place)
    assert list(labels(opened(kind, place, include=("*.jpg",)))) == ["0.jpg", "1.jpg"]
    assert len(opened(kind, place, include=("*",))) == 4


def test_the_same_name_by_chance_is_said(tmp_path: Path) -> None:
    source = opened(*as_folder(tmp_path, dict.fromkeys(["0.jpg", "0.png", "1.jpg", "2.jpg"], PNG)))
    assert len(source) == 4
    assert "1 names stand for more than one image (0.jpg and 0.png); all are taken" in source.notes


def test_extensions_are_taken_or_counted(put: Callable[..., tuple[str, Path]]) -> None:
    taken = [f"{i:02d}{extension}" for i, extension in enumerate(EXTENSIONS)] + ["A.JPG", "B.Jfif"]
    kind, place = put(*taken, "e", "f.heic", "g.HEIC", ".h.png", "__MACOSX/i.png", ".ipynb_checkpoints/j.png")
    source = opened(kind, place)
    assert sorted(labels(source)) == sorted(taken)
    (said,) = [note for note in source.notes if note.startswith("left out")]
    assert "2 .heic (f.heic)" in said
    assert "1 without extension (e)" in said
    assert "3 hidden or left by a system (" in said


def test_no_image_at_all_lists_what_there_is(put: Callable[..., tuple[str, Path]]) -> None:
    kind, place = put("a.heic", "b.heic", "e")
    with pytest.raises(DataError, match=r"holds no image; left out: 2 .heic \(a.heic\), 1 without extension \(e\)"):
        opened(kind, place)
    with pytest.raises(ConfigError, match="--include, --exclude: lsun is not made of files"):
        opened("lsun", place, include=("*",))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "AVIF", "WEBP"])
def test_extensions_of_formats_that_pillow_writes(tmp_path: Path, form: str) -> None:
    endings = {"PNG": (".apng",), "JPEG": (".jfif", ".jpe"), "AVIF": (".avif",), "WEBP": (".WebP",)}[form]
    out = io.BytesIO()
    Image.fromarray(random_images(1)[0]).save(out, form)
    source = opened(*as_folder(tmp_path, {f"{ending[1:]}{ending}": out.getvalue() for ending in endings}))
    assert len(source) == len(endings)
    assert source[0].image == out.getvalue()


def test_linked_classes_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    _, real = as_folder(tmp_path, {"n0/0.png": PNG, "n1/1.png": PNG})
    linked = tmp_path / "linked"
    (linked / "n2").mkdir(parents=True)
    (linked / "n2" / "2.png").write_bytes(PNG)
    for name in ("n0", "n1"):
        os.symlink(real / name, linked / name)
    os.symlink(real / "n1" / "1.png", linked / "n2" / "3.png")
    expected = {"n0/0.png": 0, "n1/1.png": 1, "n2/2.png": 2, "n2/3.png": 2}
    assert labels(opened("folder", linked)) == labels(opened("folder", f"file://{linked}")) == expected
    os.symlink(linked, linked / "n2" / "up")
    source = opened("folder", linked)
    assert labels(source) == expected
    assert "not followed: 1 links to a folder above them (n2/up)" in source.notes
    os.symlink(tmp_path / "nowhere.png", linked / "n2" / "4.png")
    with pytest.raises(DataError, match=r"n2/4.png: a link to nothing"):
        opened("folder", linked)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    _, place = as_folder(tmp_path, {"n0/0.png": PNG, "n1/1.png": PNG})
    (place / "n1").chmod(0)
    was = os.geteuid()
    if was == 0:
        os.chown(place / "n0", 65534, 65534)
    try:
        for folder in [place, *(parent for parent in place.parents if parent.stat().st_uid == os.getuid())]:
            folder.chmod(folder.stat().st_mode | 0o055)
        if was == 0:
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"n1/: can't be read: Permission denied"):
            opened("folder", place)
        with pytest.raises(DataError, match=r"n1/deeper: can't be read: Permission denied"):
            opened("folder", place / "n1/deeper")
    finally:
        os.seteuid(was)
        (place / "n1").chmod(0o755)


def test_names_that_stand_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("a.png", PNG), ("b.png", PNG), ("./a.png", PNG)]))
    with pytest.raises(DataError, match=r"a\.png stands twice"):
        opened("tar", tmp_path / "a.tar")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", PNG)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", PNG)
    with pytest.raises(DataError, match=r"a\.png stands twice"):
        opened("zip", tmp_path / "a.zip")


def test_zips_from_windows_keep_their_folders(tmp_path: Path) -> None:
    source = opened(*as_zip(tmp_path, {"cat\\0.png": PNG, "dog\\1.png": PNG}))
    assert labels(source) == {"cat/0.png": 0, "dog/1.png": 1}


def test_links_in_archives(tmp_path: Path) -> None:
    """A hard link in a tar is its target's content; a symbolic link, and any in a zip, is counted."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("cat/0.png")
        info.size = len(PNG)
        archive.addfile(info, io.BytesIO(PNG))
        for name, kind in (("dog/1.png", tarfile.LNKTYPE), ("dog/2.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "cat/0.png"
            archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    source = opened("tar", tmp_path / "a.tar")
    assert labels(source) == {"cat/0.png": 0, "dog/1.png": 1}
    assert source[1].image == PNG
    assert "left out: 1 of kind symbolic link (dog/2.png)" in source.notes
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("a.png", PNG)
        info_of_link = zipfile.ZipInfo("b.png")
        info_of_link.external_attr = 0o120777 << 16
        zipped.writestr(info_of_link, "a.png")
    source = opened("zip", tmp_path / "a.zip")
    assert list(labels(source)) == ["a.png"]
    assert "left out: 1 links (b.png)" in source.notes


def test_tars_that_are_not_whole_are_refused(tmp_path: Path, bucket_url: str) -> None:
    good = tar_of([(f"c{i % 2}/{i}.png", PNG) for i in range(4)])
    first = 512 + 512 * -(-len(PNG) // 512)
    flipped = bytearray(good)
    flipped[first + 3] ^= 0x41
    for data, message in (
        (good[: 2 * first + 100], "truncated"),
        (good[: 8 * first // 2], "truncated"),
        (good + good, "files follow the end"),
        (bytes(flipped), "altered"),
        (b"", "an empty object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        storage.publish(f"{bucket_url}/a.tar", data)
        for place in (tmp_path / "a.tar", f"{bucket_url}/a.tar"):
            with pytest.raises(DataError, match=message):
                opened("tar", place)


def test_parts_among_shards_are_asked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}"
    for i, name in enumerate(("train-000", "train-001", "test-000")):
        storage.publish(f"{url}/{name}.tar", tar_of([(f"{i}.png", PNG)]))
    with pytest.raises(ConfigError, match=r"side by side \(test-000.tar, train-000.tar\).*--include '\*test\*' or"):
        index_shards(url)
    with pytest.raises(ConfigError, match=r"leave none of test-000.tar, train-000.tar"):
        index_shards(url, Reading(include=("val*",)))
    index = index_shards(url, Reading(include=("train*",)))
    assert [shard.name for shard in index.shards] == ["train-000.tar", "train-001.tar"]
    with caplog.at_level("INFO"):
        assert verify_shards(url) == []
    assert "test-000.tar: not chosen (--include, --exclude)" in caplog.text
    storage.delete(f"{url}/index.json")
    assert len(index_shards(url, Reading(exclude=("test*",))).shards) == 2
    storage.delete(f"{url}/index.json")
    assert len(index_shards(url, Reading(include=("*",))).shards) == 3


def test_a_webdataset_as_a_tar_of_files_does_not_lose_its_labels(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("0.cls", b"1"), ("0.png", PNG)]))
    with pytest.raises(DataError, match=r"0\.cls holds a label, as in a WebDataset: ddpm-shards index"):
        opened("tar", tmp_path / "a.tar")
    assert opened("tar", tmp_path / "a.tar", labels="none")[0].label is None


def test_accents_in_one_character_or_in_two(tmp_path: Path) -> None:
    """macOS has written names with two; a list of labels comes from elsewhere."""
    one, two = "\u00e9", "e\u0301"
    put_image(tmp_path / "in" / f"{two}.png")
    for name in (one, two):
        (tmp_path / "l.csv").write_text(f"{name}.png,3\n")
        assert opened("folder", tmp_path / "in", labels=str(tmp_path / "l.csv"))[0].label == 3
    for name in (one, two):
        put_image(tmp_path / "classes" / name / "0.png")
    with pytest.raises(
        DataError, match=r"class folders .* look the same but aren't \('e\\u0301', '\\xe9'\); rename one"
    ):
        opened("folder", tmp_path / "classes")
    for name in ("cat", "cat "):
        put_image(tmp_path / "spaces" / name / "0.png")
    with pytest.raises(DataError, match=r"\('cat', 'cat '\)"):
        opened("folder", tmp_path / "spaces")


def put_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_as_windows_writes_them(tmp_path: Path, kind: str) -> None:
    members = [("cat\\0.png", PNG), ("dog\\1.png", PNG), ("..\\cat\\2.png", PNG)]
    if kind == "tar":
        (tmp_path / "a").write_bytes(tar_of(members))
    else:
        with zipfile.ZipFile(tmp_path / "a", "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
    source = opened(kind, tmp_path / "a", exclude=("../*",))
    assert source.class_names == ("cat", "dog")
    assert "1 by --include and --exclude (../cat/2.png)" in " ".join(source.notes)  # it is no hidden file


def test_an_encrypted_zip_is_said(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", PNG)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip: 0\.png is encrypted; unpack it"):
        opened("zip", tmp_path / "a.zip")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff.png")).write_bytes(PNG)
    assert opened("folder", tmp_path / "in")[0].image == PNG
    for name in (b"/in/c\xff", b"/in/d"):
        os.mkdir(os.fsencode(tmp_path) + name)
        Path(os.fsdecode(os.fsencode(tmp_path) + name + b"/0.png")).write_bytes(PNG)
    with pytest.raises(DataError, match=r"class folder c\\udcff: its name is not UTF-8"):
        opened("folder", tmp_path / "in", exclude=("?.png",))


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    images = random_images(3)
    source = opened(*as_zip(tmp_path, {f"{i}.png": encode_png(image) for i, image in enumerate(images)}))
    assert [np.asarray(Image.open(io.BytesIO(source[i].image))).tolist() for i in range(3)] == images.tolist()  # type: ignore[arg-type]
