"""Data sets that are arrays: scikit-learn's digits and the idx files of the MNIST family."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.data.decode import Pixels
from ddpm_dist.data.sources.base import Item, existing
from ddpm_dist.errors import DataError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGITS_LEVELS = 16


class ArraySource:
    """Images [N, H, W, C] uint8 and labels [N] or none."""

    def __init__(
        self,
        images: Pixels,
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] | None,
        about: dict[str, str],
    ) -> None:
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{len(images)} images, but {len(labels)} labels")
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
    """The idx files of the MNIST family, gzipped or not; without `labels`, the file beside the images if any."""
    pixels = read_idx(images)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: an array of {pixels.ndim} dimensions isn't images; the images file is wanted")
    if labels is None:
        beside = images.replace("images", "labels").replace("idx3", "idx1")
        labels = beside if beside != images and Path(beside).exists() else None
    numbers = read_idx(labels).astype(np.int64) if labels else None
    return ArraySource(pixels.reshape(*pixels.shape[:3], -1), numbers, None, {"source": Path(images).name})


def read_idx(path: str) -> Pixels:
    """Any array of unsigned bytes in idx format (http://yann.lecun.com/exdb/mnist)."""
    data = existing(path, "an idx file").read_bytes()
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
