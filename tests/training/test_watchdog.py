"""The heartbeat: a process that makes no step ends itself, with the traces of all threads."""

import subprocess
import sys

import pytest

from ddpm_dist.training import watchdog
from ddpm_dist.training.watchdog import EXIT_HANG, STARTUP_FACTOR, STEP_FACTOR, Watchdog

HANGS = """
import time
from ddpm_dist.training.watchdog import Watchdog
dog = Watchdog(floor_s=0.2)
def the_place_where_it_hangs():
    time.sleep(60)
for _ in range({beats}):
    dog.beat()
the_place_where_it_hangs()
"""

GOES_ON = """
import time
from ddpm_dist.training.watchdog import Watchdog
dog = Watchdog(floor_s=1.0)
for _ in range(20):
    time.sleep(0.1)
    dog.beat()
dog.stop()
time.sleep(2.0)
print("alive")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_a_hang_between_steps_ends_the_process_with_traces() -> None:
    done = run(HANGS.format(beats=3))
    assert done.returncode == EXIT_HANG
    assert "the_place_where_it_hangs" in done.stderr
    assert "no step for" in done.stderr


def test_a_hang_in_the_first_step_ends_it_too() -> None:
    assert run(HANGS.format(beats=0)).returncode == EXIT_HANG


def test_steps_keep_it_alive_and_stop_ends_the_watch() -> None:
    done = run(GOES_ON)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_the_limit_follows_the_steps_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    dog = Watchdog(floor_s=100.0)
    dog.stop()
    assert dog.limit_s == STARTUP_FACTOR * 100, "it compiles"
    now = 450.0
    dog.beat()
    assert dog.limit_s == 100, "what the first step took says nothing of the next"
    for seconds in (2.0, 3.0, 2.0):
        now += seconds
        dog.beat()
    assert dog.limit_s == 100, "the floor"
    for _ in range(4):
        now += 60.0
        dog.beat()
    assert dog.limit_s == STEP_FACTOR * 60
