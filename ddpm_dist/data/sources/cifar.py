"""CIFAR-10 as its publisher packs it."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ddpm_dist.data.decode import Pixels
from ddpm_dist.data.sources.arrays import ArraySource
from ddpm_dist.data.sources.base import existing, local, open_input, reading
from ddpm_dist.errors import DataError

CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
CIFAR_ROW = 1 + 3 * 32 * 32
MAX_BATCH_BYTES = 2**26
"""A batch has 31 MB; a small archive can hold gigabytes."""


def cifar10(path: str, split: str) -> ArraySource:
    """CIFAR-10 as published: the python or the binary archive (.tar.gz), or the folder that it unpacks to."""
    if split not in CIFAR_BATCHES:
        raise DataError(f"--split {split}: cifar10 has train and test")
    images, labels = [], []
    for name, data in _cifar_files(path, split).items():
        rows, numbers = _cifar_binary(data, name) if name.endswith(".bin") else _cifar_python(data, name)
        if numbers.dtype.kind not in "iu" or numbers.shape != (len(rows),) or not np.isin(numbers, range(10)).all():
            raise DataError(f"{path}: {name}: its labels aren't {len(rows)} classes from 0 to 9")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(numbers)
    about = {"source": f"CIFAR-10 (Krizhevsky 2009), {split}"}
    return ArraySource(np.concatenate(images), np.concatenate(labels).astype(np.int64), CIFAR_NAMES, about)


def _cifar_files(path: str, split: str) -> dict[str, bytes]:
    """The split's batches by name, in order."""
    stems = CIFAR_BATCHES[split]
    found: dict[str, bytes] = {}

    def add(name: str, file: IO[bytes]) -> None:
        if name in found:
            raise DataError(f"{path}: {name} is there twice; name the folder of one of them")
        found[name] = file.read(MAX_BATCH_BYTES + 1)
        if len(found[name]) > MAX_BATCH_BYTES:
            raise DataError(f"{path}: {name} has more than {MAX_BATCH_BYTES} bytes; it is no batch of CIFAR-10")

    wanted = {stem + suffix for stem in stems for suffix in ("", ".bin")}
    if "://" not in local(path) and existing(path, "CIFAR-10's archive or folder").is_dir():
        for batch in sorted(Path(local(path)).expanduser().rglob("*_batch*")):
            if batch.name in wanted and batch.is_file():
                with reading(str(batch), "a batch of CIFAR-10"), open(batch, "rb") as file:
                    add(batch.name, file)
    else:
        what = "CIFAR-10's archive"
        with (
            reading(path, what),
            open_input(path, what) as archive_file,
            tarfile.open(fileobj=archive_file, mode="r:*") as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content and Path(member.name).name in wanted:
                    add(Path(member.name).name, content)
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
    with reading(name, "a batch of CIFAR-10"):
        values = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        rows = np.asarray(values[b"data"])
        if rows.dtype != np.uint8:
            raise DataError(f"{name}: not a batch of CIFAR-10: pixels of {rows.dtype}")
        return rows.reshape(len(rows), CIFAR_ROW - 1), np.asarray(values[b"labels"])


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
