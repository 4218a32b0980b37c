"""Emoji drawings of three families, from npm packages: colour images that a machine without downloads has."""

import io
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.data.sources.base import Item, reading
from ddpm_dist.errors import DataError

PACKAGES = {
    "emoji-datasource-google@16.0.0": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/"),
    "emoji-datasource-twitter@16.0.0": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/"),
    "@lobehub/fluent-emoji-3d@1.1.0": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/"),
}
"""npm package: (file that `npm pack` makes, folder of its images)."""
HELD_OUT = 10
"""One base code point in so many is held out."""


class Emoji:
    """10,963 drawings, composited on white and averaged (BOX) to a square.

    Split by base code point, so that no held-out drawing has a variant (of another family, or another skin
    tone) in the training set: split "train", "heldout" or "all".
    """

    run = 1
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ("no labels",)

    def __init__(self, folder: str | None, split: str, size: int = 32) -> None:
        if split not in ("train", "heldout", "all"):
            raise DataError(f"--split {split}: emoji has train, heldout and all")
        self._size = size
        self.about = {
            "source": f"{', '.join(PACKAGES)}; {split}",
            "licence": "Apache-2.0 (Google), CC-BY-4.0 (Twitter), MIT (Fluent)",
        }
        self._files: list[tuple[str, bytes]] = []
        for archive, prefix in _archives(Path(folder) if folder else _cache_folder()):
            with reading(str(archive), "the npm package whole; remove it"), tarfile.open(archive, mode="r:gz") as tar:
                for member in tar:
                    name = Path(member.name)
                    if not member.name.startswith(prefix) or name.suffix not in (".png", ".webp"):
                        continue
                    file = tar.extractfile(member)
                    if file and (split == "all" or is_held_out(name.stem) == (split == "heldout")):
                        family = prefix.split("/")[2] if "img" in prefix else "fluent"
                        self._files.append((f"{family}_{name.stem}", file.read()))
        self._files.sort()

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self, i: int) -> bytes:
        name, data = self._files[i]
        return f"{name} {zlib.crc32(data)} {self._size}".encode()

    def __getitem__(self, i: int) -> Item:
        name, data = self._files[i]
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        small = background.convert("RGB").resize((self._size, self._size), Image.Resampling.BOX)
        return Item(name, np.asarray(small))


def is_held_out(stem: str) -> bool:
    """Whether an emoji, by its file's stem such as "1f469-1f3fb-200d-1f4bb", belongs to the held-out part."""
    base = stem.split("-")[0].lower().lstrip("0")
    return zlib.crc32(base.encode()) % HELD_OUT == 0


def _archives(folder: Path) -> list[tuple[Path, str]]:
    """The packages' files and image folders; what is missing is fetched with `npm pack`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for package, (file, prefix) in PACKAGES.items():
        archive = folder / file
        if not archive.exists():
            _fetch(package, file, folder)
        found.append((archive, prefix))
    return found


def _fetch(package: str, file: str, folder: Path) -> None:
    if not shutil.which("npm"):
        raise DataError(
            f"emoji: {folder / file} is missing and npm, which fetches it, isn't installed; install it (apt-get "
            f"install npm), or use another data set: digits needs nothing"
        )
    partial = folder / f"partial-{os.getpid()}"
    partial.mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=partial, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode or not (partial / file).exists():
            reason = done.stderr.strip().splitlines()[:1] or [f"exit code {done.returncode}"]
            raise DataError(f"emoji: `npm pack {package}` failed: {reason[0]}; is the registry reachable from here?")
        os.replace(partial / file, folder / file)
    except subprocess.TimeoutExpired:
        raise DataError(f"emoji: `npm pack {package}` took more than 10 minutes; try again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_dist" / "emoji"
