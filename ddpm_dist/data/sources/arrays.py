"""Data sets that are arrays: digits, and the MNIST family's idx files."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ddpm_dist import storage
from ddpm_dist.data.decode import Pixels
from ddpm_dist.data.sources.base import Item, check_fits, local, open_input, reading
from ddpm_dist.data.sources.labels import NONE, describe_classes
from ddpm_dist.errors import DataError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
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
        notes: Sequence[str] = (),
    ) -> None:
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{about.get('source')}: {len(images)} images, but {len(labels)} labels")
        self._images, self._labels = images, labels
        self.class_names, self.about = class_names, about
        said = "no labels" if labels is None else describe_classes(np.unique(labels).tolist(), class_names)
        self.notes = (said, *notes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Item:
        return Item("", self._images[i], None if self._labels is None else int(self._labels[i]))

    def fingerprint(self, i: int) -> bytes:
        label = None if self._labels is None else self._labels[i]
        return f"{self._images.shape[1:]} {zlib.crc32(self._images[i].tobytes())} {label}".encode()


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
    found.class_names, found.notes = FASHION_NAMES, (f"{len(FASHION_NAMES)} classes",)
    found.about = {"source": f"Fashion-MNIST (Zalando Research), {split}", "licence": "MIT"}
    return found


def idx(images: str, labels: str | None = None) -> ArraySource:
    """The idx files of the MNIST family, gzipped or not; without `labels`, the file of labels beside the images."""
    pixels = read_idx(images)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: an array of {pixels.ndim} dimensions isn't images; the images file is wanted")
    notes = []
    if labels is None:
        beside = _labels_beside(images)
        labels = next((place for place in beside if _is_there(place)), NONE)
        notes = [f"labels by {labels}" if labels != NONE else f"no {' or '.join(beside[:1])}: --labels FILE names it"]
    pixels = pixels.reshape(*pixels.shape[:3], -1)
    _check_channels(pixels, images)
    numbers = None
    if labels != NONE:
        numbers = read_idx(labels).astype(np.int64)
        if numbers.ndim != 1:
            raise DataError(f"--labels {labels}: an array of {numbers.ndim} dimensions isn't labels")
    return ArraySource(pixels, numbers, None, {"source": Path(images).name}, notes)


def _labels_beside(images: str) -> list[str]:
    """Where the labels of an images file may lie: in the same folder, with "labels" in the name, gzipped or not."""
    folder, slash, name = images.rpartition("/")
    beside = name.replace("images", "labels").replace("idx3", "idx1")
    if beside == name:
        beside = f"labels of {name}"  # a name that says nothing
    other = beside.removesuffix(".gz") if beside.endswith(".gz") else f"{beside}.gz"
    return [folder + slash + beside, folder + slash + other]


def _is_there(path: str) -> bool:
    return storage.exists(path) if "://" in local(path) else Path(local(path)).expanduser().is_file()


def read_idx(path: str) -> Pixels:
    """Any array of unsigned bytes in idx format (as LeCun's MNIST page defines it)."""
    with open_input(path, "an idx file") as file, reading(path, "an idx file"):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
        zero, kind, dimensions = struct.unpack(">HBB", stream.read(4))
        shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        if zero or kind != 8:
            raise DataError(f"{path}: not an idx file of unsigned bytes (it begins with {(zero, kind, dimensions)})")
        check_fits(math.prod(shape), path)
        data = stream.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        more = "more" if len(data) > math.prod(shape) else len(data)
        raise DataError(f"{path}: not an idx file, or not a whole one: {more} bytes for an array of {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_channels(images: Pixels, place: str) -> None:
    if images.shape[3] not in (1, 3):
        raise DataError(f"{place}: its images are {images.shape}; [N, H, W, 1 or 3] is wanted")
