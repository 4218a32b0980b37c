"""Each input of tools/make_shards.py, against files that are made here as their publishers lay them out."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import storage
from ddpm_dist.data.decode import decode, encode_png
from ddpm_dist.data.sources import SOURCES, Item, Source, SourceOptions, open_source
from ddpm_dist.data.sources.emoji import is_held_out
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from tests.data.small_sets import random_images, write_set

IMAGES = random_images(6)
CLASSES = [2, 0, 1, 1, 0, 2]


def opened(kind: str, *inputs: object, **options: object) -> Source:
    return open_source(kind, SourceOptions(tuple(str(i) for i in inputs), **options))  # type: ignore[arg-type]


def pixels_of(item: Item) -> np.ndarray:
    return decode(item.image) if isinstance(item.image, bytes) else item.image


def check(source: Source, images: np.ndarray = IMAGES, labels: list[int] | None = CLASSES) -> None:
    assert len(source) == len(images)
    for i in range(len(source)):
        assert np.array_equal(pixels_of(source[i]), images[i])
        assert source[i].label == (None if labels is None else labels[i])


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_digits_are_scaled_to_bytes() -> None:
    source = opened("digits")
    assert len(source) == 1797
    values = {int(v) for i in range(200) for v in np.unique(pixels_of(source[i]))}
    assert values <= {round(v * 255 / 16) for v in range(17)}
    assert {0, 255} <= values
    assert source[0].label == 0
    assert pixels_of(source[0]).shape == (8, 8, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    grey = IMAGES[..., 0]
    pack = gzip.compress if packed else bytes
    suffix = ".gz" if packed else ""
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(grey)))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(np.array(CLASSES, np.uint8))))
    check(opened("idx", tmp_path / f"train-images-idx3-ubyte{suffix}"), IMAGES[..., :1])
    check(opened("idx", tmp_path / f"train-images-idx3-ubyte{suffix}", labels="none"), IMAGES[..., :1], None)
    (tmp_path / "cut").write_bytes(idx_bytes(grey)[:-5])
    with pytest.raises(DataError, match="not an idx file"):
        opened("idx", tmp_path / "cut")


def test_fashion_mnist_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        opened("fashion-mnist", tmp_path / "none")


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, np.array(CLASSES))
    check(opened("npz", tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", images=IMAGES[..., 0])
    check(opened("npz", tmp_path / "b.npz"), IMAGES[..., :1], None)
    np.savez(tmp_path / "c.npz", x=np.array([object()]))
    with pytest.raises(DataError, match="plain arrays: it holds Python objects"):
        opened("npz", tmp_path / "c.npz")
    (tmp_path / "d.npz").write_text("image,class")
    with pytest.raises(DataError, match="plain arrays: it begins with b'image,class'"):
        opened("npz", tmp_path / "d.npz")
    (tmp_path / "e.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(DataError, match="plain arrays"):
        opened("npz", tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", images=IMAGES, labels=np.eye(6))
    with pytest.raises(DataError, match=r"labels are float64 \(6, 6\)"):
        opened("npz", tmp_path / "f.npz")


def cifar_python(folder: Path, images: np.ndarray) -> None:
    """Protocol 2 and keys of bytes, as Python 2 wrote them."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for n, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        batch = {b"data": rows[n : n + 1], b"labels": [n % 10], b"filenames": [b"x.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": rows[5:], b"labels": [9]}, protocol=2))


def cifar_binary(folder: Path, images: np.ndarray) -> None:
    for n, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        (folder / f"{name}.bin").write_bytes(bytes([n % 10]) + images[n].transpose(2, 0, 1).tobytes())
    (folder / "test_batch.bin").write_bytes(b"\x09" + images[5].transpose(2, 0, 1).tobytes())


@pytest.mark.parametrize("write", [cifar_python, cifar_binary])
def test_cifar10_archives(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    images = random_images(6, 32)
    folder = tmp_path / "cifar-10-batches"
    folder.mkdir()
    write(folder, images)
    check(opened("cifar10", folder), images[:5], [0, 1, 2, 3, 4])
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    check(opened("cifar10", tmp_path / "cifar.tar.gz"), images[:5], [0, 1, 2, 3, 4])
    source = opened("cifar10", tmp_path / "cifar.tar.gz", split="test")
    check(source, images[5:], [9])
    assert source.class_names is not None
    assert source.class_names[9] == "truck"


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, ("false",)

    for n in range(1, 6):
        (tmp_path / f"data_batch_{n}").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"data_batch_1: not a batch.*system"):
        opened("cifar10", tmp_path)


def write_folder(root: Path, classes: bool = True) -> list[str]:
    names = []
    for i, image in enumerate(IMAGES):
        folder = root / f"class_{'abc'[CLASSES[i]]}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"image {i}.png").write_bytes(encode_png(image))
        names.append((folder / f"image {i}.png").relative_to(root).as_posix())
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image")
    return names


def by_name(names: list[str]) -> tuple[np.ndarray, list[int]]:
    order = sorted(range(6), key=lambda i: names[i])
    return IMAGES[order], [CLASSES[i] for i in order]


def test_folders_zips_and_tars_of_files(tmp_path: Path, bucket_url: str) -> None:
    root = tmp_path / "root"
    images, labels = by_name(write_folder(root))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped, tarfile.open(tmp_path / "a.tar", "w") as tarred:
        for file in sorted(root.rglob("*.*"), reverse=True):
            zipped.write(file, file.relative_to(root))
            tarred.add(file, file.relative_to(root))
    sources = [opened("folder", root), opened("zip", tmp_path / "a.zip"), opened("tar", tmp_path / "a.tar")]
    for file in [*root.rglob("*.png"), tmp_path / "a.zip", tmp_path / "a.tar"]:
        storage.publish(f"{bucket_url}/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    remote = [("folder", "root"), ("zip", "a.zip"), ("tar", "a.tar")]
    sources += [opened(kind, f"{bucket_url}/{name}") for kind, name in remote]
    for source in sources:
        check(source, images, labels)
        assert source.class_names == ("class_a", "class_b", "class_c")


@pytest.mark.parametrize("form", ["csv", "csv with a head", "json", "edm"])
def test_labels_from_a_file(tmp_path: Path, form: str) -> None:
    names = write_folder(tmp_path / "root", classes=False)
    lines = "".join(f"{name},{label}\n" for name, label in zip(names, CLASSES, strict=True))
    text = {
        "csv": lines,
        "csv with a head": "file,class\n" + lines,
        "json": json.dumps(dict(zip(names, CLASSES, strict=True))),
        "edm": json.dumps({"labels": [list(pair) for pair in zip(names, CLASSES, strict=True)]}),
    }[form]
    path = tmp_path / f"labels.{'csv' if 'csv' in form else 'json'}"
    path.write_text(text)
    check(opened("folder", tmp_path / "root", labels=str(path)), *by_name(names))
    assert opened("folder", tmp_path / "root")[0].label is None
    path.write_text("{}" if path.suffix == ".json" else "other.png,1\n")
    with pytest.raises(DataError, match="has no class there"):
        opened("folder", tmp_path / "root", labels=str(path))


def test_a_folder_that_holds_everything_is_no_class(tmp_path: Path) -> None:
    images, labels = by_name(write_folder(tmp_path / "root"))
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as nested, zipfile.ZipFile(tmp_path / "one.zip", "w") as one:
        for file in (tmp_path / "root").rglob("*.png"):
            nested.write(file, f"download/v1/{file.relative_to(tmp_path / 'root')}")
            one.write(file, f"photos/{file.name}")
    source = opened("zip", tmp_path / "nested.zip")
    check(source, images, labels)
    assert source.class_names == ("class_a", "class_b", "class_c")
    source = opened("zip", tmp_path / "one.zip")
    assert source[0].label is None
    assert source.class_names is None


@pytest.mark.parametrize("text", ["image 0.png,\n", '{"image 0.png": null}', '{"image 0.png": 1.5}'])
def test_what_is_no_class_is_refused(tmp_path: Path, text: str) -> None:
    names = write_folder(tmp_path / "root", classes=False)
    path = tmp_path / ("labels.json" if text.startswith("{") else "labels.csv")
    others = dict.fromkeys(names[1:], 1)
    lines = "".join(f"{name},{label}\n" for name, label in others.items())
    path.write_text(json.dumps({**others, **json.loads(text)}) if path.suffix == ".json" else lines + text)
    with pytest.raises(DataError, match=r"image 0\.png: .* is not a class"):
        opened("folder", tmp_path / "root", labels=str(path))


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_as_hugging_face_lays_it_out(tmp_path: Path, nested: bool) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [encode_png(image) for image in IMAGES]
    column = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(files)] if nested else files
    features = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    table = arrow.table({"image": column, "label": CLASSES}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(table.slice(0, 4), tmp_path / "train-0.parquet", row_group_size=3)
    parquet.write_table(table.slice(4), tmp_path / "train-1.parquet")
    source = opened("parquet", tmp_path)
    check(source)
    assert source.class_names == ("a", "b", "c")
    check(opened("parquet", tmp_path, labels="none"), labels=None)


def test_lsun_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for i, image in enumerate(IMAGES):
            transaction.put(f"{i:040x}".encode(), encode_png(image))
    check(opened("lsun", tmp_path / "db"), labels=None)
    with pytest.raises(DataError, match="no such file or folder"):
        opened("lsun", tmp_path / "none")


def test_webdataset(tmp_path: Path) -> None:
    write_set(f"file://{tmp_path}", [4, 2])
    labels = [i % 7 for i in range(6)]
    check(opened("webdataset", f"file://{tmp_path}"), labels=labels)
    (tmp_path / "elsewhere").mkdir()
    for name in ("index", "index.json"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    check(opened("webdataset", tmp_path, index=str(tmp_path / "elsewhere")), labels=labels)
    check(opened("webdataset", f"file://{tmp_path}", index=f"file://{tmp_path}/elsewhere"), labels=labels)


def test_emoji_are_composited_and_split_by_base_code_point(tmp_path: Path) -> None:
    from ddpm_dist.data.sources.emoji import PACKAGES

    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :, 0] = pixels[:32, :, 3] = 255  # red above, nothing below
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    stems = [f"1f4{i:02x}" for i in range(60)] + [f"1f4{i:02x}-1f3fb" for i in range(60)]
    for file, prefix in PACKAGES.values():
        with tarfile.open(tmp_path / file, "w:gz") as archive:
            for stem in stems:
                info = tarfile.TarInfo(f"{prefix}{stem}.png")
                info.size = buffer.getbuffer().nbytes
                archive.addfile(info, io.BytesIO(buffer.getvalue()))
    train, held_out = opened("emoji", tmp_path), opened("emoji", tmp_path, split="heldout")
    assert len(train) + len(held_out) == len(opened("emoji", tmp_path, split="all")) == 360
    assert 0 < len(held_out) < 120
    image = pixels_of(train[0])
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[-1, 0].tolist() == [255, 255, 255]
    assert is_held_out("1f469-1f3fb-200d-1f4bb") == is_held_out("1f469") == is_held_out("1F469-1f3ff")


def test_emoji_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm.*isn't installed.*digits needs nothing"):
        opened("emoji", tmp_path)


def test_wrong_kinds_and_inputs_have_clear_messages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mnist' is not an input; there are digits"):
        opened("mnist")
    for kind in set(SOURCES) - {"digits", "emoji", "fashion-mnist", "parquet"}:
        with pytest.raises(ConfigError, match="one INPUT is wanted"):
            opened(kind)
        with pytest.raises((DataError, ConfigError, NotFoundError), match="none"):
            opened(kind, f"file://{tmp_path}/none" if kind == "webdataset" else tmp_path / "none")
    for kind, options, message in (
        ("npz", {"split": "test"}, "--split test: npz has no parts; fashion-mnist"),
        ("lsun", {"labels": "a.csv"}, r"--labels a\.csv: lsun takes its labels from the input alone; leave the option"),
        ("idx", {"images": "x"}, "--images x: idx has no names for it; npz, parquet have"),
        ("folder", {"index": "file:///x"}, "--index file:///x: folder has no index; the input webdataset has one"),
        ("npz", {"include": ("*",)}, "--include, --exclude: npz is not made of files; folder, zip, tar, parquet are"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(kind, tmp_path / "none", **options)
    with pytest.raises(ConfigError, match=r"digits: they need no INPUT, x is given"):
        opened("digits", "x")
    (tmp_path / "text").write_text("no archive")
    for kind in ("zip", "tar", "cifar10", "npz", "idx"):
        with pytest.raises(DataError, match="not "):
            opened(kind, tmp_path / "text")
