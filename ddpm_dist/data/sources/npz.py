"""Arrays in a NumPy archive."""

import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ddpm_dist.data.sources.arrays import ArraySource
from ddpm_dist.data.sources.base import check_fits, open_input, reading
from ddpm_dist.data.sources.labels import NONE, number_classes
from ddpm_dist.errors import DataError

LABELS_OF = {"images": "labels", "arr_0": "arr_1"}
"""The names that say what they are (arr_0 and arr_1: np.savez without names, as in improved-diffusion's samples)."""


class Head(NamedTuple):
    """What an archive says of an array before it is unpacked."""

    shape: tuple[int, ...]
    dtype: Any

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def npz(path: str, images: str | None = None, labels: str | None = None, sparse: str | None = None) -> ArraySource:
    """Images [N, H, W, C] or [N, H, W] uint8, and labels [N], of an .npz file.

    sparse: as for `number_classes`.
    images, labels: names of arrays; "none" for no labels. Without them, those of LABELS_OF, or an array that is alone.
    """
    what = "an .npz file of plain arrays"
    with open_input(path, what) as file, reading(path, what):
        if (begin := file.read(16))[:2] != b"PK":
            raise ValueError(f"it begins with {begin!r}")
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            heads = _heads(archive, path)
            listed = ", ".join(f"{name} {head}" for name, head in heads.items()) or "nothing"
            image_name = _choose_images(heads, images, f"{path}: holds {listed}")
            label_name = _choose_labels(heads, image_name, labels, f"{path}: holds {listed}")
            pixels = _read(archive, image_name, heads, path)
            values = None if label_name is None else _read(archive, label_name, heads, path)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        span = f", {pixels.min()} to {pixels.max()}" if pixels.size and pixels.dtype.kind in "iufb" else ""
        raise DataError(
            f"{path}: {image_name} is {heads[image_name]}{span}; images are [N, H, W, C] of uint8, 0 to 255"
        )
    pixels = pixels.reshape(*pixels.shape[:3], -1) if pixels.size else pixels.reshape(*pixels.shape[:3], 1)
    if pixels.shape[3] not in (1, 3):
        raise DataError(f"{path}: {image_name} is {pixels.shape}; [N, H, W, 1 or 3] is wanted")
    others = [name for name in heads if name not in (image_name, label_name)]
    notes = [f"images are {image_name}{f', labels {label_name}' if label_name else ''}"]
    notes += [f"left out: {', '.join(others)}"] if others else []
    numbers, names = None, None
    if values is not None:
        if values.shape not in ((len(values),), (len(values), 1)) or values.dtype.kind not in "iufU":
            raise DataError(f"{path}: labels are {values.dtype} {values.shape}; [N] class numbers or names are wanted")
        found, names = number_classes(values.reshape(-1).tolist(), lambda i: f"{path}: {label_name}[{i}]", sparse)
        numbers = np.array(found, np.int64)
    return ArraySource(pixels, numbers, names, {"source": Path(path).name}, notes)


def _heads(archive: zipfile.ZipFile, path: str) -> dict[str, Head]:
    """{name: what its head says} of all arrays."""
    heads: dict[str, Head] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in heads:
            raise DataError(f"{path}: {name} stands twice in it")
        with reading(f"{path}: {name}", "an array"), archive.open(info) as member:
            version = npy.read_magic(member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(member)
            heads[name] = Head(shape, dtype)
    return heads


def _choose_images(heads: Mapping[str, Head], asked: str | None, place: str) -> str:
    known = [name for name in LABELS_OF if name in heads]
    if asked is not None:
        if asked not in heads:
            raise DataError(f"--images {asked}: {place}")
        return asked
    if known:
        return known[0]
    if len(heads) == 1:
        return next(iter(heads))
    raise DataError(f"{place}; say which array holds the images and which the labels: --images NAME --labels NAME")


def _choose_labels(heads: Mapping[str, Head], images: str, asked: str | None, place: str) -> str | None:
    if asked == NONE:
        return None
    if asked is not None:
        if asked not in heads:
            raise DataError(f"--labels {asked}: {place}")
        return asked
    usual = [name for name in (LABELS_OF.get(images), *LABELS_OF.values()) if name in heads and name != images]
    if images in LABELS_OF and usual:
        return usual[0]
    count = heads[images].shape[:1]
    like = [n for n, h in heads.items() if n != images and h.shape in (count, (*count, 1)) and h.dtype.kind in "iufU"]
    if like:
        raise DataError(f"{place}; --labels {' or '.join(like)} or none?")
    return None


def _read(archive: zipfile.ZipFile, name: str, heads: Mapping[str, Head], path: str) -> np.ndarray[Any, Any]:
    check_fits(prod(heads[name].shape) * heads[name].dtype.itemsize, f"{path}: {name}")
    member = name if name in archive.namelist() else f"{name}.npy"
    if heads[name].dtype.hasobject:
        raise ValueError("it holds Python objects")
    with archive.open(member) as file:
        array: np.ndarray[Any, Any] = npy.read_array(file, allow_pickle=False)
    return array
