"""What a kill leaves in the temp folder is removed by the next start, and nothing else is."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ddpm_dist import temporary
from ddpm_dist.temporary import TemporaryFolder

OTHER = """
import sys, time
from ddpm_dist.temporary import TemporaryFolder
folder = TemporaryFolder("test")
(folder.path / "file").write_text("of somebody")
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temp folder of this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def start() -> "tuple[subprocess.Popen[str], Path]":
    """A process that has a folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(temp: Path) -> None:
    killed, left = start()
    living, used = start()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.parent.parent == temp
        assert (left / "file").exists(), "otherwise this test could not fail"
        with TemporaryFolder("test") as mine:
            assert not left.parent.exists()
            assert (used / "file").read_text() == "of somebody"
            temporary.collect()
            assert mine.exists(), "nor is its own"
        assert list(temp.iterdir()) == [used.parent]
    finally:
        living.kill()
        living.wait()


def test_what_is_not_provably_ours_and_left_stays(temp: Path) -> None:
    """Folders of other programs, links, one that is being made, one on a disk without locks, another user's."""
    elsewhere = temp / "elsewhere"
    named, begun, unlocked = (temp / f"{temporary.PREFIX}{name}" for name in ("backup", "begun", "unlocked"))
    for folder in (elsewhere, named, begun, unlocked):
        folder.mkdir()
        (folder / "work").write_text("dear")
    (elsewhere / temporary.MARK).touch()
    (begun / f"{temporary.MARK}.new").touch()
    (temp / f"{temporary.PREFIX}link").symlink_to(elsewhere)
    (unlocked / temporary.MARK).symlink_to(elsewhere / temporary.MARK)
    expected = sorted(temp.rglob("*"))
    temporary.collect()
    assert sorted(temp.rglob("*")) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_another_users_folder_stays(temp: Path) -> None:
    theirs = temp / f"{temporary.PREFIX}theirs"
    theirs.mkdir()
    (theirs / temporary.MARK).touch()
    os.chown(theirs, 12345, 12345)
    temporary.collect()
    assert theirs.exists()
    os.chown(theirs, 0, 0)
    temporary.collect()
    assert not theirs.exists()


def test_a_fork_leaves_its_parents_folder(temp: Path) -> None:
    folder = TemporaryFolder("test")
    child = multiprocessing.get_context("fork").Process(target=folder.close)
    child.start()
    child.join()
    assert folder.path.exists()
    folder.close()
    folder.close()
    assert not list(temp.iterdir())


def test_it_goes_with_a_process_that_ends_by_itself(temp: Path) -> None:
    subprocess.run([sys.executable, "-c", OTHER.replace("time.sleep(600)", "")], check=True, capture_output=True)
    assert not list(temp.iterdir())
