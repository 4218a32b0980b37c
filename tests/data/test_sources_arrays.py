"""Arrays and labels by name, never by luck: .npz, idx, and classes in text."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import storage
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.sources import Source, SourceOptions, open_source
from ddpm_dist.data.sources.labels import describe_classes, number_classes
from ddpm_dist.errors import ConfigError, DataError
from tests.data.small_sets import random_images

IMAGES = random_images(5)[..., 0]


def opened(kind: str, *inputs: object, **options: object) -> Source:
    return open_source(kind, SourceOptions(tuple(str(i) for i in inputs), **options))  # type: ignore[arg-type]


def labels(source: Source) -> list[int | None]:
    return [source[i].label for i in range(len(source))]


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_keras_mnist_is_asked_about(tmp_path: Path) -> None:
    """The first array of the file is the test set's images."""
    place = tmp_path / "mnist.npz"
    np.savez(place, x_test=IMAGES[:2], x_train=IMAGES, y_train=np.arange(5), y_test=np.arange(2))
    with pytest.raises(DataError, match=r"holds x_test uint8 \[2, 8, 8\], x_train .* --images NAME --labels NAME"):
        opened("npz", place)
    with pytest.raises(DataError, match=r"--labels y_train or none\?"):
        opened("npz", place, images="x_train")
    source = opened("npz", place, images="x_train", labels="y_train")
    assert np.array_equal(np.stack([source[i].image for i in range(5)])[..., 0], IMAGES)  # type: ignore[misc]
    assert labels(source) == [0, 1, 2, 3, 4]
    assert "left out: x_test, y_test" in source.notes
    assert labels(opened("npz", place, images="x_test", labels="none")) == [None, None]
    with pytest.raises(DataError, match="5 images, but 2 labels"):
        opened("npz", place, images="x_train", labels="y_test")
    for options, message in (
        ({"images": "x"}, r"--images x: .*holds x_test"),
        ({"images": "x_train", "labels": "y"}, r"--labels y: .*holds x_test"),
        ({"images": "y_test", "labels": "none"}, r"y_test is int64 \[2\], 0 to 1; images are \[N, H, W, C\] of uint8"),
    ):
        with pytest.raises(DataError, match=message):
            opened("npz", place, **options)


def test_unknown_arrays_beside_known_ones(tmp_path: Path) -> None:
    place = tmp_path / "a.npz"
    np.savez(place, images=IMAGES, y=np.arange(5))
    with pytest.raises(DataError, match=r"--labels y or none\?"):
        opened("npz", place)
    np.savez(place, images=IMAGES, latents=np.zeros((5, 2)))
    source = opened("npz", place)
    assert source.notes == ("no labels", "images are images", "left out: latents")
    np.savez(place, X=IMAGES)
    assert len(opened("npz", place)) == 5
    np.savez(place, X=IMAGES, y=np.arange(5))
    with pytest.raises(DataError, match=r"say which array holds the images"):
        opened("npz", place)
    np.savez(place, images=IMAGES / 255)
    with pytest.raises(DataError, match=r"images is float64 \[5, 8, 8\], 0.0 to 0.99\d*; images are"):
        opened("npz", place)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[1], [0], [1], [2], [0]], np.uint8), [1, 0, 1, 2, 0]),
        (np.array([1.0, 0.0, 1.0, 2.0, 0.0]), [1, 0, 1, 2, 0]),
        (np.array(["b", "a", "b", "c", "a"]), [1, 0, 1, 2, 0]),
        (np.array([3.7, 0, 0, 0, 0]), r"labels\[0\]: 3.7 is not a class"),
        (np.array([0, -1, 0, 0, 0]), r"labels\[1\]: -1 is not a class.*--labels none drops them"),
        (np.eye(5), r"labels are float64 \(5, 5\); \[N\] class numbers or names are wanted"),
    ],
)
def test_labels_of_an_npz(tmp_path: Path, values: np.ndarray, expected: list[int] | str) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=values)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            opened("npz", tmp_path / "a.npz")
    else:
        assert labels(opened("npz", tmp_path / "a.npz")) == expected


def test_arrays_that_memory_cannot_hold_are_refused_unread(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8))
    data = (tmp_path / "a.npz").read_bytes()
    assert len(data) < 400
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 999, 999), }"
    import zipfile

    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + (len(header)).to_bytes(2, "little") + header + bytes(99))
    with pytest.raises(DataError, match=r"images: unpacked it has \d+ bytes, more than memory holds"):
        opened("npz", tmp_path / "b.npz")
    (tmp_path / "images").write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**20, 28)))
    with pytest.raises(DataError, match="more than memory holds"):
        opened("idx", tmp_path / "images")


@pytest.mark.parametrize("packed", [(False, False), (True, True), (True, False), (False, True)])
def test_idx_labels_lie_beside_the_images(tmp_path: Path, bucket_url: str, packed: tuple[bool, bool]) -> None:
    """By the file's name alone (a folder may be called images), gzipped or not, at a URL as well."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, array, zipped in (
        ("train-images-idx3-ubyte", IMAGES, packed[0]),
        ("train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8), packed[1]),
    ):
        data = gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array)
        (folder / (name + ".gz" * zipped)).write_bytes(data)
        storage.publish(f"{bucket_url}/images/{name}{'.gz' * zipped}", data)
    images = "images/train-images-idx3-ubyte" + ".gz" * packed[0]
    for place in (tmp_path / images, f"{bucket_url}/{images}"):
        source = opened("idx", place)
        assert labels(source) == [0, 1, 2, 3, 4]
        assert source.notes[1].startswith("labels by ")
        assert labels(opened("idx", place, labels="none")) == [None] * 5


def test_idx_without_labels_says_so(tmp_path: Path) -> None:
    for name in ("t10k-images-idx3-ubyte", "pictures"):
        (tmp_path / name).write_bytes(idx_bytes(IMAGES))
        source = opened("idx", tmp_path / name)
        assert labels(source) == [None] * 5
        assert "--labels FILE names it" in source.notes[1]
    with pytest.raises(DataError, match="an array of 3 dimensions isn't labels"):
        opened("idx", tmp_path / "pictures", labels=str(tmp_path / "pictures"))
    (tmp_path / "long").write_bytes(idx_bytes(IMAGES) + b"x")
    with pytest.raises(DataError, match="not a whole one: more bytes"):
        opened("idx", tmp_path / "long")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1.0", "10.0", "2.0"], ([1, 10, 2], None)),
        ([1.0, 10, "2"], ([1, 10, 2], None)),
        (["007", "+1", "1e1"], ([7, 1, 10], None)),
        ([True, False, True], ([1, 0, 1], None)),
        (["b", "a", "nan"], ([1, 0, 2], ("a", "b", "nan"))),
        (["1_000", "x", "٣"], ([0, 1, 2], ("1_000", "x", "٣"))),
        ([" 1\r\n", "\ufeff0", np.int64(2)], ([1, 0, 2], None)),
        (["cat\n", "cat", "[other]"], ([1, 1, 0], ("[other]", "cat"))),
        ([], ([], None)),
    ],
)
def test_numbers_in_text(values: list[object], expected: tuple[list[int], tuple[str, ...] | None]) -> None:
    assert number_classes(values, str) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0", "3.7"], "1: '3.7' is not a class"),
        (["-0.5"], "0: '-0.5' is not a class"),
        ([float("nan")], "0: nan is not a class"),
        ([0, None], "1: None is not a class"),
        ([0, [1]], r"1: \[1\] is not a class"),
        ([2**31], "0: 2147483648 is not a class"),
        (["1e999"], "0: '1e999' is not a class"),
        (["cat", "[0, 1]"], r"1: '\[0, 1\]' is not a class.*--labels none takes none"),
        (["cat", '{"a": 1}'], "1: '{.*}' is not a class"),
        (["a\nb"], "is not a class"),
        (["0", "1", "n/a"], "2: class 'n/a', but 0: class '0'; all are to be numbers, or all names"),
    ],
)
def test_what_is_no_number_of_a_class(values: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        number_classes(values, str)


def test_numbers_with_big_gaps_are_asked_about() -> None:
    values = [5, 3000, 77, 5]
    with pytest.raises(ConfigError, match=r"3 numbers \(5, 77, 3000\) up to 3000: --sparse-labels renumber makes 3"):
        number_classes(values, str)
    assert number_classes(values, str, "renumber") == ([0, 2, 1, 0], ("5", "77", "3000"))
    assert number_classes(values, str, "keep") == (values, None)
    assert number_classes([6, 9, 2], str) == ([6, 9, 2], None)
    with pytest.raises(ConfigError, match=r"150 different ones for 200 samples .* are no classes;.*--labels none"):
        number_classes([f"a photo of {i % 150}" for i in range(200)], str)


def test_classes_that_look_the_same_are_asked_about() -> None:
    with pytest.raises(ConfigError, match=r"look the same but aren't \('e\\u0301', '\\xe9'\)"):
        number_classes(["\u00e9", "e\u0301", "f"], str)


def test_classes_are_described_by_number_and_three_names() -> None:
    assert describe_classes([0, 1, 2, 3], ("a", "b", "c", "d")) == "4 classes: a, b, c, …"
    assert describe_classes([5], None) == "6 classes (1 of them occur): 5"
    assert describe_classes([0], ("a",)) == "1 class: a"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(encode_png(random_images(1)[0]))
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.png,1.0\n1.png,10.0\n2.png,2.0\n", [1, 10, 2]),
        ("./0.png,cat\n1.png,dog\n2.png,cat\n", [0, 1, 0]),
        ("file,class\n0.png,0\n1.png,1\n2.png,0\nother.png,x\n", [0, 1, 0]),
        ("\ufefffile,class\r\n.\\0.png,0\r\n1.png,1\r\n2.png, 0 \r\n", [0, 1, 0]),
        ("split,label,file\ntrain,cat,0.png\ntrain,dog,1.png\ntrain,cat,2.png\n", [0, 1, 0]),
        ("0.png,1\n1.png,1\n2.png,1\n0.png,1\n", [1, 1, 1]),
        ("0.png,1\n1.png,1\n2.png,1\n0.png,2\n", "0.png stands twice, with '1' and '2'"),
        ("0.png,train,1\n1.png,train,1\n2.png,train,1\n", "3 columns .* a first line is to name them"),
        ("0.png,1\n1.png\n", r"line 2 has 1 column \('1.png'\); each is file,class, with a comma between"),
        ("0.png;1\n", "line 1 has 1 column"),
        ("0.png\t1\n", "line 1 has 1 column"),
        ("0,1\n1,2\n2,3\n", r"0\.png has no class there \(3 of 3 files have none\); it names 0"),
        ('{"file_name": "0.png", "label": 0}\n', r"is JSON by its look: one object .* ends in \.json"),
        ("0.png,0\n1.png,n/a\n2.png,1\n", "all are to be numbers, or all names"),
        ('0.png,"0\n', "not a CSV"),
        ("", "it is empty"),
        ("0.png," + "x" * 200_000 + "\n", "not a CSV"),
    ],
)
def test_csv(files: Path, text: str, expected: list[int] | str) -> None:
    (files.parent / "l.csv").write_text(text)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            opened("folder", files, labels=str(files.parent / "l.csv"))
    else:
        assert labels(opened("folder", files, labels=str(files.parent / "l.csv"))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0.png": 1, "1.png": 1, "0.png": 2}', "0.png stands twice"),
        ('{"labels": [["0.png", 1], ["0.png", 2]]}', "0.png stands twice"),
        ('{"0.png": 1, "./0.png": 2}', "0.png stands twice"),
        ('{"labels": null}', "its labels are null; --labels none"),
        ("[1]", "a list of"),
        ("7", "it is '7'"),
        ("1" * 5000, "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps({"0.png": 1, "1.png": {}, "2.png": 1}), r"1.png: {} is not a class"),
        ("\xff", "not a JSON object"),
    ],
)
def test_json(files: Path, text: str, message: str) -> None:
    (files.parent / "l.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        opened("folder", files, labels=str(files.parent / "l.json"))


def test_lines_that_name_nothing_are_counted(files: Path) -> None:
    (files.parent / "l.csv").write_text("0.png,1\n1.png,1\n2.png,1\n3.png,1\n")
    source = opened("folder", files, labels=str(files.parent / "l.csv"))
    assert "1 of its lines name nothing that is taken" in source.notes[0]
    (files.parent / "l.csv").write_text("file,label\n0.png,1\n1.png,1\n2.png,1\n")  # a head is no such line
    assert "its lines" not in opened("folder", files, labels=str(files.parent / "l.csv")).notes[0]
    with pytest.raises(ConfigError, match="--labels x: cifar10 takes its labels from the input alone"):
        opened("cifar10", files, labels="x")
