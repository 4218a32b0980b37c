"""Image files in a folder, a zip, or a tar; local, or at a URL."""

import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ddpm_dist import storage
from ddpm_dist.data.sources.base import Item, existing, open_input
from ddpm_dist.data.sources.labels import label_files
from ddpm_dist.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


class FileSource:
    """Named files, in sorted order, and how to read one."""

    run = 1

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes], labels: str | None, place: str) -> None:
        self._names = sorted(name for name in names if is_image(name))
        self._read = read
        self._labels, self.class_names = label_files(self._names, labels)
        self.about = {"source": PurePosixPath(place).name}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Item:
        name = self._names[i]
        label = None if self._labels is None else self._labels[i]
        return Item(name, self._read(name), label)


def is_image(name: str) -> bool:
    """By its extension, and not hidden (macOS leaves ._name.jpg beside name.jpg)."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def folder(path: str, labels: str | None) -> FileSource:
    """All images below a folder."""
    if "://" in path:
        names = list(storage.list_objects(path))
        return FileSource(names, lambda name: storage.read(storage.join(path, name)), labels, path)
    root = existing(path, "a folder of images")
    if not root.is_dir():
        raise DataError(f"{path}: a file, where a folder of images is expected")
    names = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    return FileSource(names, lambda name: Path(root, name).read_bytes(), labels, path)


def zip_archive(path: str, labels: str | None) -> FileSource:
    """All images in a zip."""
    try:
        archive = zipfile.ZipFile(open_input(path, "a zip of images"))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a zip: {error}") from None

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zipfile.zlib.error, RuntimeError, NotImplementedError) as error:  # type: ignore[attr-defined]
            raise DataError(f"{path}: {name}: {error}") from None

    return FileSource(archive.namelist(), read, labels, path)


def tar_archive(path: str, labels: str | None) -> FileSource:
    """All images in a tar that isn't compressed (a compressed one can't be read from the middle)."""
    file, lock = open_input(path, "a tar of images"), threading.Lock()
    where: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg():
                    where[member.name.removeprefix("./")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a plain tar ({error}); unpack a compressed one and use `folder`") from None

    def read(name: str) -> bytes:
        start, size = where[name]
        with lock:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise DataError(f"{path}: truncated inside {name}")
        return data

    return FileSource(list(where), read, labels, path)
