"""Disks without hard links (exFAT, SMB, gcsfuse), and folders that can't be synced."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from ddpm_dist import storage
from ddpm_dist.engine import World
from ddpm_dist.errors import NotFoundError
from ddpm_dist.state import StateStore, history
from ddpm_dist.storage import local
from tests.engine.worker_group import config

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.link and the fsync of folders fail, as such a disk has them fail."""
    fsync = os.fsync

    def link(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    def sync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.usefixtures("no_links")
def test_create_once_without_links(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/owner/1"
    assert storage.create(url, b"first\nof all")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first\nof all"
    storage.check_create(url, b"third")
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["1"]


@pytest.mark.usefixtures("no_links")
def test_of_many_threads_one_creates(tmp_path: Path) -> None:
    url, won = f"file://{tmp_path}/owner/1", []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if storage.create(url, b"%d" % i) else None) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read(url) == b"%d" % won[0]


WHOLE = local._head(b"0123456789") + b"\n0123456789"


@pytest.mark.parametrize("cut", [3, 20, len(WHOLE) - 1])
def test_what_a_kill_left_incomplete_is_nothing(cut: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WHOLE[:cut])
    long_ago = time.time() - 60
    os.utime(tmp_path / "a", (long_ago, long_ago))
    with pytest.raises(NotFoundError, match="incomplete, as its writer was killed"):
        storage.read(f"file://{tmp_path}/a")
    assert not storage.create(f"file://{tmp_path}/a", b"mine")


def test_what_is_being_written_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WHOLE[:30])
    threading.Timer(0.5, lambda: (tmp_path / "a").write_bytes(WHOLE)).start()
    assert storage.read(f"file://{tmp_path}/a") == b"0123456789"


def test_a_first_claim_that_was_left_incomplete_is_none(tmp_path: Path) -> None:
    cfg = config(f"file://{tmp_path}/run")
    owner = tmp_path / "run" / "checkpoints" / "owner"
    owner.mkdir(parents=True)
    (owner / "000001").write_bytes(b"")
    store = StateStore(cfg, ALONE)
    assert store.claim() is None
    assert store.attempt == 2


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("left", [b"", WHOLE[:20]])
def test_an_incomplete_claim_is_no_claim(left: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(f"file://{tmp_path}/run")
    first = StateStore(cfg, ALONE)
    first.claim()
    killed = tmp_path / "run" / "checkpoints" / "owner" / "000002"
    killed.write_bytes(left)
    os.utime(killed, (1, 1))
    claims, _ = history.read(first.url)
    assert sorted(claims) == [1, 2]
    heir = StateStore(cfg, ALONE)
    heir.claim()
    assert heir.attempt == 3
    assert "attempt 2 never claimed this run" in caplog.text
