"""The line, or the bar, that says how far a work is."""

import contextlib
import os
import sys
import termios
import time

import pytest

from ddpm_dist.progress import Progress, StepProgress, clock, counted


def test_the_rate_counts_from_the_first_result_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 samples were there before; 10 come after a start-up of 20 s, 20 more in the 4 s after it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("make_shards", "sample", 100, 30)
    now[0] = 120
    progress.add(10)
    now[0] = 122
    progress.add(10)
    progress.add(10)
    assert progress._line(124, "2 workers") == "make_shards: 60 of 100 samples, 5.0/s, 0:08 left, 2 workers"


def test_it_speaks_every_few_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("index_shards", "shard", 100)
    with caplog.at_level("INFO"):
        for _ in range(40):
            now[0] += 1
            progress.add()
        assert len(caplog.messages) == 40 // 5
        progress.add(60)
    assert caplog.messages[-1] == "index_shards: 100 of 100 shards, 2.5/s, 0:00 left", "the end is said at once"
    assert caplog.messages[0] == "index_shards: 5 of 100 shards, 1.0/s, 1:35 left"


def test_one_is_not_many() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    screen, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with open(terminal, "w") as stderr, caplog.at_level("INFO"):
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("sampling", "image", 100, 20) as progress:
            progress.add(80, "2 workers")
    os.set_blocking(screen, False)
    said = ""
    with contextlib.suppress(BlockingIOError, OSError):  # at the end of what there is
        while True:
            said += os.read(screen, 10_000).decode()
    assert "sampling" in said
    assert "100/100" in said
    assert "2 workers" in said
    assert caplog.messages == []


def test_a_log_has_plain_lines_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    caplog.set_level("INFO")
    progress = StepProgress(100, 1100, 32)
    now = 10.0
    progress.show(600, 0.5, 1600.0, 0.01)
    progress.close()
    assert caplog.messages == ["step 600/1100 (19,200 images)  loss 0.5000  1600 images/s  data wait 1.0%  0:10 left"]


def test_hours_are_shown_when_there_are_any() -> None:
    assert [clock(seconds) for seconds in (9.6, 75, 3723)] == ["0:10", "1:15", "1:02:03"]
