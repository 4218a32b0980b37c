"""Image files in a folder, a zip, or a tar; local, or at a URL."""

import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ddpm_dist import storage
from ddpm_dist.data import tar
from ddpm_dist.data.decode import BadSampleError
from ddpm_dist.data.sources import layout
from ddpm_dist.data.sources.base import Item, existing, files_below, local, normal, open_input, reading, shown
from ddpm_dist.data.sources.labels import FOLDERS, NONE, describe_classes, from_mapping, parse_json, read_labels
from ddpm_dist.data.sources.layout import Choice, Folders, is_image
from ddpm_dist.errors import DataError

MAX_FILE_BYTES = 2**29
"""Larger files are no images that are decoded (decode.MAX_PIXELS), and a few kB of zip can hold gigabytes."""


ENCRYPTED = 1
"""Flag of a zip's member."""


class FileSource:
    """Named files, in sorted order, and how to read one.

    stamps: {path below the input: its size, or what else changes with its content}
    """

    run = 1

    def __init__(
        self,
        stamps: Mapping[str, str],
        read: Callable[[str], bytes],
        choice: Choice,
        place: str,
        notes: Sequence[str] = (),
    ) -> None:
        self._stamps, self._read, self._choice, self._place = stamps, read, choice, place
        images = sorted(name for name in stamps if is_image(name) and choice.takes(name))
        out = layout.left_out(stamps, choice)
        if not images:
            raise DataError(f"{place}: holds no image{f'; {out}' if out else ', and nothing else'}")
        pairs = layout.check_pairs(images, choice, place)
        folders = Folders(images, choice, place)
        self._names = folders.names
        self._labels, self.class_names, said = self._label(folders)
        part = f"--split {choice.split}: {len(self._names)} of {len(images)} images" if choice.split else None
        self.notes = tuple(note for note in (part, said, pairs, out, *notes) if note)
        self.about = {"source": PurePosixPath(normal(place)).name}

    def _label(self, folders: Folders) -> tuple[list[int] | None, tuple[str, ...] | None, str]:
        """(class of each file, class names, what is to be said): as asked, or by dataset.json, or by the folders."""
        asked = self._choice.labels
        member = next((name for name in self._stamps if name.endswith(".cls") and not layout.is_leftover(name)), None)
        if asked is None and member:
            raise DataError(
                f"{self._place}: {shown(member)} holds a label, as in a WebDataset: ddpm-shards index reads those, "
                f"and then the input `webdataset`; --labels none takes the images alone"
            )
        if asked == NONE:
            return None, None, "no labels, as --labels none says"
        if asked not in (None, FOLDERS):
            found = read_labels(asked)
            labels, names = from_mapping(self._names, found, f"--labels {asked}", self._choice.sparse)
            others = len(found) - len(self._names)
            unused = f"; {others} of its lines name nothing that is taken" if others else ""
            return labels, names, f"{describe_classes(labels or [], names)} (by {asked}){unused}"
        meta = layout.find_meta(self._stamps, self._names, self._place) if asked is None else None
        if meta is None:
            return folders.classes()
        place = f"{self._place}: {shown(meta)}"
        remedy = "(--labels folders takes the folders for classes, --labels none takes none)"
        try:
            given = parse_json(self._read(meta), f"{place} {remedy}")
        except BadSampleError as error:
            raise DataError(f"{place}: {error} {remedy}") from None
        if given is None:
            return None, None, f"no labels, as {shown(meta)} says {remedy}"
        to_name = layout.below(self._names, meta)
        labels, names = from_mapping(list(to_name), given, f"{place} {remedy}", self._choice.sparse)
        return labels, names, f"{describe_classes(labels or [], names)} (by {shown(meta)}; {remedy[1:]}"

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Item:
        name = self._names[i]
        return Item(name, self._read(name), None if self._labels is None else self._labels[i])

    def fingerprint(self, i: int) -> bytes:
        name = self._names[i]
        label = None if self._labels is None else self._labels[i]
        return f"{name}\0{self._stamps[name]}\0{label}".encode("utf-8", "surrogateescape")


def folder(path: str, choice: Choice) -> FileSource:
    """All images below a folder. Links are followed; a folder that can't be read is an error."""
    if "://" in local(path):
        objects = storage.list_objects(path)
        stamps = {name: str(size) for name, size in objects.items()}
        return FileSource(stamps, lambda name: storage.read(storage.join(path, name)), choice, path)
    root = existing(path, "a folder of images")
    if not root.is_dir():
        raise DataError(f"{path}: a file, where a folder of images is expected")
    notes: list[str] = []
    stamps = dict(files_below(root, is_image, notes))

    def read(name: str) -> bytes:
        with reading(f"{path}: {shown(name)}", "a file"):
            return Path(root, name).read_bytes()

    return FileSource(stamps, read, choice, path, notes)


def zip_archive(path: str, choice: Choice) -> FileSource:
    """All images in a zip."""
    with reading(path, "a zip of images"):
        archive = zipfile.ZipFile(open_input(path, "a zip of images"))
        members: dict[str, zipfile.ZipInfo] = {}
        links = []
        for info in archive.infolist():
            name = _tidy(info.filename)
            if info.is_dir() or name.endswith("/"):
                continue
            if info.flag_bits & ENCRYPTED:
                raise DataError(f"{path}: {shown(name)} is encrypted; unpack it, and make a set of the folder")
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                links.append(name)
                continue
            if name in members:
                raise DataError(f"{path}: {name} stands twice in it")
            members[name] = info

    def read(name: str) -> bytes:
        if members[name].file_size > MAX_FILE_BYTES:
            raise BadSampleError(
                "too_large",
                f"{path}: {name} has {members[name].file_size} bytes; at most {MAX_FILE_BYTES} are unpacked",
            )
        try:
            return archive.read(members[name])
        except Exception as error:  # zlib, lzma and zipfile each have their own
            raise BadSampleError("corrupt", f"{path}: {name}: {error or type(error).__name__}") from None

    stamps = {name: f"{info.file_size} {info.CRC}" for name, info in members.items()}
    notes = [f"left out: {len(links)} links ({links[0]})"] if links else []
    return FileSource(stamps, read, choice, path, notes)


def tar_archive(path: str, choice: Choice) -> FileSource:
    """All images in a tar that isn't compressed (a compressed one can't be read from the middle)."""
    file, lock = open_input(path, "a tar of images"), threading.Lock()
    where: dict[str, tuple[int, int]] = {}
    others: dict[str, list[str]] = {}
    for member in tar.files(file, file.seek(0, os.SEEK_END), path):
        name = _tidy(member.path)
        place = (member.offset, member.size)
        if member.kind == "hard link":
            target = where.get(_tidy(member.target))
            if target is None:
                raise DataError(f"{path}: {name} is a link to {member.target!r}, which is no file before it")
            place = target
        elif member.kind:
            others.setdefault(member.kind, []).append(name)
            continue
        if name in where:
            raise DataError(f"{path}: {name} stands twice in it")
        where[name] = place

    def read(name: str) -> bytes:
        start, size = where[name]
        if size > MAX_FILE_BYTES:
            raise BadSampleError(
                "too_large", f"{path}: {shown(name)} has {size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        with lock:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise DataError(f"{path}: truncated inside {name}")
        return data

    notes = [f"left out: {len(names)} of kind {kind} ({names[0]})" for kind, names in others.items()]
    return FileSource({name: f"{size}" for name, (_, size) in where.items()}, read, choice, path, notes)


def _tidy(name: str) -> str:
    """A member's path; some writers on Windows use \\."""
    return name.replace("\\", "/").removeprefix("./")
