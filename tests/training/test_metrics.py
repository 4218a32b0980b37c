"""What a run says of itself: where its time went, and what all ranks heard."""

import time

import pytest

from ddpm_dist.training import metrics
from ddpm_dist.training.control import Shared
from ddpm_dist.training.metrics import Goodput, PhaseClock, Window

SECONDS = {"data": 1.0, "forward": 1.5, "backward": 2.5, "step": 2.0, "ema": 0.5, "checkpoint": 0.25,
           "snapshot": 0.125, "other": 0.5}  # fmt: skip


def test_the_clock_accounts_for_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    clock = PhaseClock()
    with clock.phase("data"):
        now += 3
    now += 1
    for _ in range(300):
        with clock.phase("step"):
            now += 0.25
    assert clock.read() == clock.take() == {**dict.fromkeys(metrics.PHASES, 0.0), "data": 3, "step": 75, "other": 1}
    assert sum(clock.read().values()) == 0


def test_a_state_between_two_log_lines_holds_the_time_since() -> None:
    goodput = Goodput()
    goodput.add(SECONDS)
    saved = goodput.plus(SECONDS)
    assert (saved.productive_s, saved.data_wait_s, saved.checkpoint_s, saved.snapshot_s) == (14, 2, 0.5, 0.25)
    assert goodput.productive_s == 7, "the original goes on from its own sums"


def test_lost_and_restart_time() -> None:
    now = time.time()
    goodput = Goodput(began_at=now - 100, productive_s=50)
    goodput.resume(saved_at=now - 40, last_sign_at=now - 30, restarts=1)
    shares = goodput.shares()
    assert goodput.restarts == 1
    assert shares["lost"] == pytest.approx(0.1, abs=1e-3)
    assert shares["restart"] == pytest.approx(0.3, abs=1e-3)
    assert shares["goodput"] == pytest.approx(0.5, abs=1e-3)


def test_means_over_ranks_and_steps() -> None:
    window = Window(10, bad_samples=40)
    window.add(Shared(6.0, 2, [6.0, 0, 0, 0], [2, 0, 0, 0], 1, False, False, False))
    window.add(Shared(2.0, 2, [0, 0, 0, 2.0], [0, 0, 0, 2], 3, False, False, False))
    steps, means = window.take(12)
    assert steps == 2
    assert means == {"loss/mean": 2.0, "loss/t_quartile_1": 3.0, "loss/t_quartile_4": 1.0}
    assert window.take(13) == (1, {})
    assert window.bad_samples == 43, "an attempt counts its own, all in all"
