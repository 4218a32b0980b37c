"""Images for people and for other programs: quantisation, a grid, an .npz as ADM's evaluator reads it, PNG files."""

import zipfile
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.data import encode_png
from ddpm_dist.temporary import TemporaryFolder

GRID_WIDTH = 640


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] to the nearest of 0 … 255: the one quantisation of samples, before any metric."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor, columns: int | None = None, at_least: int = GRID_WIDTH) -> bytes:
    """PNG of [N, C, H, W] uint8 images in rows; small ones are enlarged by a whole factor, without smoothing."""
    count, channels, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    factor = max(1, round(at_least / (columns * (width + 1))))
    height, width = height * factor, width * factor
    picture = np.full((rows * (height + factor), columns * (width + factor), channels), 128, np.uint8)
    for i, image in enumerate(images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)):
        y, x = (i // columns) * (height + factor), (i % columns) * (width + factor)
        picture[y : y + height, x : x + width] = image.permute(1, 2, 0).numpy()
    return encode_png(picture)


class NpzWriter:
    """Streams images into an .npz: arr_0 uint8 [N, H, W, C], and arr_1 int64 [N] labels if there are any."""

    def __init__(self, url: str, count: int, shape: tuple[int, int, int]) -> None:
        self._url = url
        self._labels: list[int] = []
        self._folder = TemporaryFolder("npz")
        self._path = self._folder.path / "samples.npz"
        self._zip = zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED)
        self._array = self._zip.open(_member("arr_0"), "w", force_zip64=True)
        channels, height, width = shape
        _write_header(self._array, np.dtype(np.uint8), (count, height, width, channels))

    def add(self, image: NDArray[np.uint8], label: int | None) -> None:
        """image: [C, H, W] uint8."""
        self._array.write(image.transpose(1, 2, 0).tobytes())
        if label is not None:
            self._labels.append(label)

    def close(self) -> None:
        """Publishes the file."""
        self._array.close()
        if self._labels:
            with self._zip.open(_member("arr_1"), "w") as file:
                _write_header(file, np.dtype(np.int64), (len(self._labels),))
                file.write(np.array(self._labels, np.int64).tobytes())
        self._zip.close()
        storage.upload(self._path, self._url)
        self._folder.close()


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the bytes don't tell when they were written


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
