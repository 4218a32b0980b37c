"""Data sets that are arrays: digits, the MNIST family's idx files, CIFAR-10, `.npz`."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.data.decode import Pixels
from ddpm_dist.data.sources.base import Item, existing, open_input
from ddpm_dist.errors import DataError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
CIFAR_ROW = 1 + 3 * 32 * 32
DIGITS_LEVELS = 16


class ArraySource:
    """Images [N, H, W, C] uint8 and labels [N] or none."""

    run = 1

    def __init__(
        self,
        images: Pixels,
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] | None,
        about: dict[str, str],
    ) -> None:
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{about.get('source')}: {len(images)} images, but {len(labels)} labels")
        self._images, self._labels = images, labels
        self.class_names, self.about = class_names, about

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Item:
        return Item("", self._images[i], None if self._labels is None else int(self._labels[i]))


def digits() -> ArraySource:
    """1,797 handwritten digits, grey, 8×8. Their values 0..16 are scaled to 0..255 (rounded)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: they come with scikit-learn; pip install scikit-learn") from None
    data = load_digits()
    images = np.rint(data.images * (255 / DIGITS_LEVELS)).astype(np.uint8)[..., None]
    about = {
        "source": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits)",
        "licence": "BSD-3-Clause (scikit-learn), CC-BY-4.0 (UCI)",
        "values": "0..16 scaled to 0..255",
    }
    return ArraySource(images, data.target.astype(np.int64), tuple(str(d) for d in range(10)), about)


def fashion_mnist(folder: str | None, split: str) -> ArraySource:
    """60,000 (train) or 10,000 (test) grey 28×28 pictures of clothes."""
    path = Path(folder or FASHION_MNIST)
    if not path.is_dir():
        raise DataError(
            f"fashion-mnist: no folder {path}; install Debian's package (apt-get install dataset-fashion-mnist), or "
            f"name a folder that holds train-images-idx3-ubyte.gz and the three files beside it"
        )
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise DataError(f"--split {split}: fashion-mnist has train and test")
    found = idx(str(path / f"{prefix}-images-idx3-ubyte.gz"), str(path / f"{prefix}-labels-idx1-ubyte.gz"))
    found.class_names = FASHION_NAMES
    found.about = {"source": f"Fashion-MNIST (Zalando Research), {split}", "licence": "MIT"}
    return found


def idx(images: str, labels: str | None = None) -> ArraySource:
    """The idx files of the MNIST family, gzipped or not; without `labels`, the local file beside the images."""
    pixels = read_idx(images)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: an array of {pixels.ndim} dimensions isn't images; the images file is wanted")
    if labels is None:
        beside = images.replace("images", "labels").replace("idx3", "idx1")
        labels = beside if beside != images and Path(beside).exists() else "none"
    numbers = None if labels == "none" else read_idx(labels).astype(np.int64)
    return ArraySource(pixels.reshape(*pixels.shape[:3], -1), numbers, None, {"source": Path(images).name})


def read_idx(path: str) -> Pixels:
    """Any array of unsigned bytes in idx format (as LeCun's MNIST page defines it)."""
    with open_input(path, "an idx file") as file:
        data = file.read()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        zero, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
    except (OSError, EOFError, struct.error) as error:
        raise DataError(f"{path}: not an idx file: {error}") from None
    start = 4 + 4 * dimensions
    if zero or kind != 8 or len(data) - start != int(np.prod(shape)):
        raise DataError(f"{path}: not an idx file of unsigned bytes, or not a whole one")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def npz(path: str, labels: str | None = None) -> ArraySource:
    """Images [N, H, W, C] uint8 under `images`, `arr_0` or the first name; labels under `labels` or `arr_1`."""
    with open_input(path, "an .npz file") as file:
        data = file.read()
    try:
        if not data.startswith(b"PK"):
            raise ValueError(f"it begins with {data[:16]!r}")
        arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = "it holds Python objects" if "allow_pickle" in str(error) else error
        raise DataError(f"{path}: not an .npz file of plain arrays: {why}") from None
    name = next((n for n in ("images", "arr_0") if n in arrays), next(iter(arrays), ""))
    images = arrays.get(name)
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{path}: holds {', '.join(arrays)}; an array [N, H, W, C] of uint8 called images is wanted")
    images = images.reshape(*images.shape[:3], -1)
    if images.shape[3] not in (1, 3):
        raise DataError(f"{path}: {name} is {images.shape}; [N, H, W, 1 or 3] is wanted")
    found = next((arrays[n] for n in ("labels", "arr_1") if n in arrays and labels != "none"), None)
    if found is not None and (found.ndim != 1 or found.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels are {found.dtype} {found.shape}; [N] whole numbers are wanted")
    return ArraySource(images, None if found is None else found.astype(np.int64), None, {"source": Path(path).name})


def cifar10(path: str, split: str) -> ArraySource:
    """CIFAR-10 as published: the python or the binary archive (.tar.gz), or the folder that it unpacks to."""
    if split not in CIFAR_BATCHES:
        raise DataError(f"--split {split}: cifar10 has train and test")
    images, labels = [], []
    for name, data in _cifar_files(path, split).items():
        rows, numbers = _cifar_binary(data, name) if name.endswith(".bin") else _cifar_python(data, name)
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(numbers)
    about = {"source": f"CIFAR-10 (Krizhevsky 2009), {split}"}
    return ArraySource(np.concatenate(images), np.concatenate(labels).astype(np.int64), CIFAR_NAMES, about)


def _cifar_files(path: str, split: str) -> dict[str, bytes]:
    """The split's batches by name, in order."""
    stems = CIFAR_BATCHES[split]
    found: dict[str, bytes] = {}
    if "://" not in path and existing(path, "CIFAR-10's archive or folder").is_dir():
        for file in Path(path).rglob("*_batch*"):
            found[file.name] = file.read_bytes()
    else:
        with open_input(path, "CIFAR-10's archive") as archive_file:
            try:
                with tarfile.open(fileobj=archive_file, mode="r:*") as archive:
                    for member in archive:
                        content = archive.extractfile(member)
                        if content and "_batch" in member.name:
                            found[Path(member.name).name] = content.read()
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DataError(f"{path}: not CIFAR-10's archive: {error}") from None
    for suffix in ("", ".bin"):
        if all(stem + suffix in found for stem in stems):
            return {stem + suffix: found[stem + suffix] for stem in stems}
    raise DataError(f"{path}: {', '.join(stems)} are not all there; cifar-10-python.tar.gz or -binary.tar.gz has them")


def _cifar_binary(data: bytes, name: str) -> tuple[Pixels, NDArray[Any]]:
    if not data or len(data) % CIFAR_ROW:
        raise DataError(f"{name}: {len(data)} bytes are not rows of {CIFAR_ROW}: truncated")
    rows = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_ROW)
    return rows[:, 1:], rows[:, 0]


def _cifar_python(data: bytes, name: str) -> tuple[Pixels, NDArray[Any]]:
    try:
        values = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        rows = np.asarray(values[b"data"], np.uint8)
        return rows.reshape(len(rows), CIFAR_ROW - 1), np.asarray(values[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{name}: not a batch of CIFAR-10: {error}") from None


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays and nothing else, since a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            if name in ("ndarray", "dtype"):
                return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which images don't need")
