"""The line that says how far a work is."""

import time

import pytest

from ddpm_dist.data.progress import Progress, counted


def test_the_rate_counts_from_the_first_result_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 samples were there before; 10 come after a start-up of 20 s, 20 more in the 4 s after it."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("make_shards", "sample", 100, 30)
    clock[0] = 120
    progress.add(10)
    clock[0] = 122
    progress.add(10)
    progress.add(10)
    assert progress.line(124) == "make_shards: 60 of 100 samples, 5.0/s, 8 s left"


def test_it_speaks_every_few_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("index_shards", "shard", 100)
    with caplog.at_level("INFO"):
        for _ in range(40):
            clock[0] += 1
            progress.add()
    assert len(caplog.messages) == 40 // 6
    assert caplog.messages[0] == "index_shards: 6 of 100 shards, 1.0/s, 94 s left"


def test_one_is_not_many() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
