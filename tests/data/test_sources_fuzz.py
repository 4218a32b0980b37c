"""Real files of each kind of input, damaged by chance: an item, or one of our errors, soon and in little memory."""

import gzip
import io
import json
import pickle
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ddpm_dist.data.decode import BadSampleError, encode_png
from ddpm_dist.data.sources import SourceOptions, files, open_source
from ddpm_dist.data.sources.labels import read_labels
from ddpm_dist.errors import DdpmDistError
from tests.data.small_sets import random_images, write_set

SMALL = settings(
    max_examples=60, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SPARE_BYTES = 2**31


@pytest.fixture
def bounded() -> Iterator[None]:
    """No more memory than a little: what asks for more gets a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


IMAGES = random_images(5, 32)
FILES = {f"{'ab'[i % 2]}/{i}.png": encode_png(image[:8, :8]) for i, image in enumerate(IMAGES)}


def idx() -> bytes:
    grey = IMAGES[..., 0]
    return struct.pack(">HBB3I", 0, 8, 3, *grey.shape) + grey.tobytes()


def npz(save: Callable[..., None]) -> bytes:
    out = io.BytesIO()
    save(out, images=IMAGES, labels=np.arange(5))
    return out.getvalue()


def zipped(method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        archive.writestr("dataset.json", json.dumps({"labels": [[name, 1] for name in FILES]}))
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(name.replace("a/", "ä" * 60 + "/"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    column = pa.array([{"bytes": data, "path": name} for name, data in FILES.items()])
    table = pa.table({"image": column, "label": pa.array(["a", "b", "a", "c", "b"])})
    pq.write_table(table, out, row_group_size=2, compression="zstd")
    return out.getvalue()


def cifar() -> bytes:
    out = io.BytesIO()
    rows = IMAGES.transpose(0, 3, 1, 2).reshape(5, -1)
    with tarfile.open(fileobj=out, mode="w") as archive:
        for n in range(1, 6):
            data = pickle.dumps({b"data": rows[n - 1 : n], b"labels": [n]}, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{n}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "idx": idx,
    "idx, gzipped": lambda: gzip.compress(idx()),
    "npz": lambda: npz(np.savez),
    "npz, compressed": lambda: npz(np.savez_compressed),
    "zip": lambda: zipped(zipfile.ZIP_STORED),
    "zip, deflated": lambda: zipped(zipfile.ZIP_DEFLATED),
    "zip, lzma": lambda: zipped(zipfile.ZIP_LZMA),
    "tar": tarred,
    "parquet": parquet,
    "cifar10": cifar,
    "cifar10, gzipped": lambda: gzip.compress(cifar()),
}
ENDINGS = {"parquet": "a.parquet"}


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, with bytes flipped (near the ends more often), or with a piece moved, doubled, or zeroed."""
    size = len(data)
    anywhere = st.integers(0, size - 1) | st.integers(0, min(size, 600) - 1) | st.integers(max(0, size - 600), size - 1)
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "move", "zero", "fill"]))
    if kind == "cut":
        return data[: draw(anywhere)]
    found = bytearray(data)
    if kind == "flip":
        for at in draw(st.lists(anywhere, min_size=1, max_size=6)):
            found[at] = draw(st.sampled_from([found[at] ^ 1 << draw(st.integers(0, 7)), 0, 255, 127]))
        return bytes(found)
    start, length, to = draw(anywhere), draw(st.integers(1, 64)), draw(anywhere)
    piece = {"move": data[start : start + length], "zero": bytes(length), "fill": b"\xff" * length}[kind]
    found[to : to + len(piece)] = piece
    return bytes(found)


@cache
def whole(kind: str) -> bytes:
    return KINDS[kind]()


def read_all(kind: str, place: Path, **options: str) -> int:
    """Opens an input and reads what it has; the number of items. Our errors pass."""
    try:
        source = open_source(kind, SourceOptions((str(place),), **options))  # type: ignore[arg-type]
    except DdpmDistError:
        return 0
    for i in range(min(len(source), 20)):
        try:
            item = source[i]
            assert isinstance(item.image, bytes | np.ndarray)
            assert item.label is None or item.label >= 0
            source.fingerprint(i)
        except (DdpmDistError, BadSampleError):
            pass
    return len(source)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_inputs_are_read(tmp_path: Path, kind: str) -> None:
    place = tmp_path / ENDINGS.get(kind, "in")
    place.write_bytes(whole(kind))
    assert read_all(kind.partition(",")[0], place) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_raise_our_errors_alone(tmp_path: Path, kind: str, bounded: None) -> None:
    place = tmp_path / ENDINGS.get(kind, "in")

    @SMALL
    @given(damage(whole(kind)))
    def check(data: bytes) -> None:
        place.write_bytes(data)
        read_all(kind.partition(",")[0], place)

    check()


def test_damaged_databases_raise_our_errors_alone(tmp_path: Path) -> None:
    """Few, since each is walked by a process of its own."""
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as environment, environment.begin(write=True) as write:
        for i in range(60):
            write.put(b"k%02d" % i, bytes([i]) * (i % 4 * 2000 + 5))
    place = tmp_path / "db" / "data.mdb"
    data = place.read_bytes()

    @settings(SMALL, max_examples=15)
    @given(damage(data))
    def check(data: bytes) -> None:
        place.write_bytes(data)
        read_all("lsun", place.parent)

    check()


def test_damaged_sets_raise_our_errors_alone(tmp_path: Path, bounded: None) -> None:
    write_set(f"file://{tmp_path}/set", [3, 2])
    objects = {file: file.read_bytes() for file in (tmp_path / "set").rglob("*") if file.is_file()}

    @SMALL
    @given(st.sampled_from(sorted(objects)).flatmap(lambda file: st.tuples(st.just(file), damage(objects[file]))))
    def check(change: tuple[Path, bytes]) -> None:
        for file, data in objects.items():
            file.write_bytes(change[1] if file == change[0] else data)
        read_all("webdataset", tmp_path / "set")

    check()


CSV = b"file,class\r\n" + b"".join(b"%s,%d\r\n" % (name.encode(), i) for i, name in enumerate(FILES))
JSON = json.dumps({"labels": [[name, i] for i, name in enumerate(FILES)]}).encode()


@pytest.mark.parametrize(("name", "data"), [("l.csv", CSV), ("l.json", JSON)], ids=["csv", "json"])
def test_damaged_labels_raise_our_errors_alone(tmp_path: Path, name: str, data: bytes, bounded: None) -> None:
    for file, content in FILES.items():
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / file).write_bytes(content)

    @SMALL
    @given(damage(data) | st.binary(max_size=60) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        read_all("folder", tmp_path / "in", labels=str(tmp_path / name))

    check()
    (tmp_path / name).write_bytes(data)
    assert len(read_labels(str(tmp_path / name))) >= 5


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kB that unpack to gigabytes (to 8 MB here): a zip's member, with a true and with a false size."""
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 2**22)
    place = tmp_path / "bomb.zip"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        for _ in range(8):
            member.write(bytes(2**20))
    source = open_source("zip", SourceOptions((str(place),)))
    with pytest.raises(BadSampleError, match="8388608 bytes; at most 4194304"):
        source[0]
    data = place.read_bytes().replace(struct.pack("<I", 8 * 2**20), struct.pack("<I", 99))
    place.write_bytes(data)
    with pytest.raises(BadSampleError, match="corrupt"):
        open_source("zip", SourceOptions((str(place),)))[0]
