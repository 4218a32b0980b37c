"""Parquet and LMDB as they lie around: columns, parts, damage; each said by file and row."""

import json
import resource
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddpm_dist import storage
from ddpm_dist.data.decode import decode, encode_png
from ddpm_dist.data.sources import Source, SourceOptions, open_source
from ddpm_dist.errors import DataError
from tests.data.small_sets import random_images

IMAGES = random_images(4)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS = pa.array([{"bytes": encode_png(image), "path": None} for image in IMAGES], STRUCT)


def opened(kind: str, *inputs: object, **options: object) -> Source:
    return open_source(kind, SourceOptions(tuple(str(i) for i in inputs), **options))  # type: ignore[arg-type]


def put(place: Path, image: Any = ROWS, **columns: Any) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image, **columns}), place, row_group_size=3)
    return place


def labels(source: Source) -> list[int | None]:
    return [source[i].label for i in range(len(source))]


def test_class_names_in_the_label_column(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", label=pa.array(["b", "a", "c", "a"]))
    put(tmp_path / "b.parquet", label=pa.array(["d"] * 4))
    source = opened("parquet", tmp_path)
    assert labels(source) == [1, 0, 2, 0, 3, 3, 3, 3]
    assert source.class_names == ("a", "b", "c", "d")
    assert source.notes == ("4 classes: a, b, c, … (column label)",)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.0, 0.0, 2.0, 0.0]), [1, 0, 2, 0]),
        (pa.array(["1.0", "10.0", "2.0", "0"]), [1, 10, 2, 0]),
        (pa.array([True, False, True, False]), [1, 0, 1, 0]),
        (pa.array(["x", "y", "x", "y"]).dictionary_encode(), [0, 1, 0, 1]),
        (pa.array([0, 0, 0, 3.7]), "a.parquet: row 3: column label: 3.7 is not a class"),
        (pa.array([0, None, 0, 0]), "row 1: column label: None is not a class"),
        (pa.array([[1]] * 4), r"row 0: column label: \[1\] is not a class"),
        (pa.array([-1] * 4), "--labels none drops them"),
    ],
)
def test_labels(tmp_path: Path, column: Any, expected: list[int] | str) -> None:
    put(tmp_path / "a.parquet", label=column)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            opened("parquet", tmp_path)
        assert labels(opened("parquet", tmp_path, labels="none")) == [None] * 4
    else:
        assert labels(opened("parquet", tmp_path)) == expected


def test_class_names_of_hugging_face(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(500)]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": ROWS, "label": [5, 499, 0, 5]})
    head = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(head), tmp_path / "a.parquet")
    source = opened("parquet", tmp_path)
    assert labels(source) == [5, 499, 0, 5]
    assert source.class_names == tuple(names)
    features["label"]["names"] = names[:400]
    head = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(head), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: its class names differ from those of .*a\.parquet"):
        opened("parquet", tmp_path)
    with pytest.raises(DataError, match=r"b\.parquet: row 1: class 499, but 400 class names"):
        opened("parquet", tmp_path / "b.parquet")


def test_columns_by_name(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", mask=ROWS, label=pa.array([0, 1, 2, 3]), kind=pa.array([3, 2, 1, 0]))
    source = opened("parquet", tmp_path)
    assert labels(source) == [0, 1, 2, 3]
    assert "left out: columns mask, kind" in source.notes
    assert labels(opened("parquet", tmp_path, labels="kind")) == [3, 2, 1, 0]
    assert np.array_equal(decode(opened("parquet", tmp_path, images="mask")[2].image), IMAGES[2])  # type: ignore[arg-type]
    for options, message in (
        ({"images": "photo"}, r"--images photo: .*columns image \(struct<.*label \(int64\)"),
        ({"labels": "class"}, r"--labels class: .*columns"),
        ({"images": "kind"}, r"column kind is int64; images as bytes"),
    ):
        with pytest.raises(DataError, match=message):
            opened("parquet", tmp_path, **options)
    pq.write_table(pa.table({"pixels": ROWS}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns pixels \(struct.*; --images NAME says which"):
        opened("parquet", tmp_path)
    put(tmp_path / "a.parquet", img=ROWS)
    with pytest.raises(DataError, match=r"--images image or img\?"):
        opened("parquet", tmp_path)
    put(tmp_path / "a.parquet", label=pa.array([0] * 4), labels=pa.array([1] * 4))
    with pytest.raises(DataError, match=r"--labels label or labels\?"):
        opened("parquet", tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/test-0.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_parts_are_asked_for(tmp_path: Path, bucket_url: str, names: tuple[str, str]) -> None:
    for i, name in enumerate(names):
        data = put(tmp_path / name, label=pa.array([i] * 4)).read_bytes()
        storage.publish(f"{bucket_url}/{name}", data)
    for place in (tmp_path, bucket_url):
        with pytest.raises(DataError, match=r"parts of a set side by side.*--split test or train"):
            opened("parquet", place)
        assert labels(opened("parquet", place, split="train")) == [0] * 4
        assert labels(opened("parquet", place, split="all")) == [1] * 4 + [0] * 4
        source = opened("parquet", place, include=("*test*",))
        assert labels(source) == [1] * 4
        assert source.notes[0].startswith("1 of 2 .parquet files at ")
    assert labels(opened("parquet", tmp_path / names[0])) == [0] * 4


def test_leftovers_and_links(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.PARQUET")
    put(tmp_path / "elsewhere" / "b.parquet")
    for name in ("._a.parquet", ".cache/c.parquet", ".ipynb_checkpoints/a.parquet"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(opened("parquet", tmp_path / "in")) == 8
    with pytest.raises(DataError, match=r"a\.parquet is named twice"):
        opened("parquet", put(tmp_path / "a.parquet"), tmp_path / "a.parquet")
    assert len(opened("parquet", tmp_path / "elsewhere", put(tmp_path / "other" / "b.parquet"))) == 8


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", label=pa.array([0, 1, 2, 3]))
    put(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: no column label, which .*a\.parquet has"):
        opened("parquet", tmp_path)
    assert len(opened("parquet", tmp_path, labels="none")) == 8
    (tmp_path / "b.parquet").write_bytes(b"PAR1xPAR1")
    with pytest.raises(DataError, match=r"b\.parquet: not Parquet"):
        opened("parquet", tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"b\.parquet: a pointer of Git LFS, not the file itself; `git lfs pull`"):
        opened("parquet", tmp_path)
    for kind in ("zip", "npz", "idx", "cifar10"):
        with pytest.raises(DataError, match=r"b\.parquet: a pointer of Git LFS"):
            opened(kind, tmp_path / "b.parquet")


def test_damaged_pages_and_paths_without_bytes(tmp_path: Path) -> None:
    place = put(tmp_path / "a.parquet", pa.array([{"bytes": None, "path": "a.jpg"}] * 4, STRUCT))
    with pytest.raises(DataError, match=r"a\.parquet: row 2: only the path of an image \(a\.jpg\)"):
        opened("parquet", place)[2]
    put(place, pa.array([{"bytes": None, "path": None}] * 4, STRUCT))
    assert opened("parquet", place)[0].image == b""
    put(place)
    data = bytearray(place.read_bytes())
    data[4:200] = bytes(196)
    place.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: row group 0"):
        opened("parquet", place)[0]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    for i in range(120):
        put(tmp_path / f"{i:03d}.parquet", ROWS.slice(0, 1), label=pa.array([i]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, limits[1]))
    try:
        assert labels(opened("parquet", tmp_path)) == list(range(120))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as environment, environment.begin(write=True) as write:
        for i in range(40):
            write.put(b"k%02d" % i, encode_png(IMAGES[i % 4]) * (1 + i % 3 * 20))
    return tmp_path / "db" / "data.mdb"


def test_a_cut_or_damaged_lmdb_is_an_error_and_no_signal(database: Path) -> None:
    whole = database.read_bytes()
    for place in (database, database.parent):
        assert len(opened("lsun", place)) == 40
    for data, message in (
        (whole[:5000], "truncated: 5000 bytes"),
        (whole[:-4096], "truncated"),
        (whole[:8192] + b"\xff" * (len(whole) - 8192), "damaged"),
        (b"", "damaged, or not an LMDB"),
        (b"no database" * 1000, "damaged, or not an LMDB"),
    ):
        database.write_bytes(data)
        with pytest.raises(DataError, match=message):
            opened("lsun", database.parent)
    database.unlink()
    with pytest.raises(DataError, match=r"holds no data\.mdb"):
        opened("lsun", database.parent)


def test_a_set_with_an_index_by_its_path(tmp_path: Path) -> None:
    from tests.data.small_sets import write_set

    write_set(f"file://{tmp_path}/set", [4, 2])
    assert len(opened("webdataset", tmp_path / "set")) == 6
