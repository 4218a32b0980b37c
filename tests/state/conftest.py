"""What tests of states share."""

from pathlib import Path

import pytest

from ddpm_dist.config import Config
from ddpm_dist.state import format as fmt, reader
from tests.engine.worker_group import config


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return config(f"file://{tmp_path}/run")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little tensors make several files and blocks."""
    monkeypatch.setattr(fmt, "FILE_BYTES", 512)
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 64)
    monkeypatch.setattr(reader, "RANGE_BYTES", 256)
