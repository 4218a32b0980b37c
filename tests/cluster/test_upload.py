"""What `ray job submit --working-dir .` takes along, and what is said of it."""

import logging
import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _zip_files

from ddpm_dist.cluster import upload
from tests.ray_local import ROOT

URI = "gcs://_ray_pkg_0123456789abcdef.zip"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process runs, as Ray unpacks a package."""
    unpacked = tmp_path / "_ray_pkg_0123456789abcdef"
    unpacked.mkdir()
    monkeypatch.chdir(unpacked)
    monkeypatch.setattr(upload, "LARGE_BYTES", 1000_000)
    return unpacked


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def test_what_is_large_is_named_as_deep_as_it_lies(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder / "code.py", 2000)
    write(folder / "assets/photos/a.png", 4_000_000)
    write(folder / "assets/photos/b.png", 4_000_000)
    write(folder / "assets/readme", 100)
    write(folder / "model.pt", 3_000_000)
    upload.say_if_large(URI)
    assert "is 11 MB, which each node fetches" in caplog.text
    assert "assets/photos (8 MB), model.pt (3 MB). Keep" in caplog.text
    assert """--runtime-env-json '{"excludes": ["/assets/photos", "/model.pt"]}'""" in caplog.text
    assert zipped(folder, ["/assets/photos", "/model.pt"]) == {"code.py", "assets/readme"}


def test_code_is_not_spoken_of(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "code.py", 2000)
    upload.say_if_large(URI)
    write(folder / "photos/a.png", 4_000_000)
    upload.say_if_large(None)
    monkeypatch.chdir(folder.parent)
    upload.say_if_large(URI)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_links_to_environments_and_photos_stay_here(tmp_path: Path) -> None:
    """By .gitignore; Ray follows links."""
    outside, checkout = tmp_path / "outside", tmp_path / "checkout"
    write(outside / "large", 1000)
    checkout.mkdir()
    for name in (".venv", ".venv-3.12", "photos", "out"):
        (checkout / name).symlink_to(outside)
    (checkout / "other").symlink_to(outside)
    shutil.copy(ROOT / ".gitignore", checkout)
    assert zipped(checkout, []) == {".gitignore", "other/large"}


def zipped(folder: Path, excludes: list[str]) -> set[str]:
    """The files that Ray uploads of a folder."""
    package = folder.parent / "package.zip"
    _zip_files(str(folder), [*get_runtime_env_default_excludes(), *excludes], str(package), include_gitignore=True)
    return {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
