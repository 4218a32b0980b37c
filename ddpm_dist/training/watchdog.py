"""Heartbeat: a rank that makes no step within a limit ends its process, so that the launcher starts again.

Neither gloo nor Ray finds a rank that hangs; NCCL finds it after many minutes. The other ranks of a hung
one wait in a collective, so their watchdogs fire as well and the whole attempt ends.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections import deque
from statistics import median

log = logging.getLogger(__name__)

EXIT_HANG = 75
STARTUP_FACTOR = 5
"""The first step compiles, connects and fills caches; it gets so many times the floor."""
STEP_FACTOR = 20
"""The limit of a later step is the larger of the floor and so many median steps."""


class Watchdog:
    """Ends the process with EXIT_HANG, after the stack traces of all threads, if `beat` stays away."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._steps_s: deque[float] = deque(maxlen=50)
        self._last = time.monotonic()
        self._first = True
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def limit_s(self) -> float:
        """Seconds that the step under way may take."""
        if self._first:
            return STARTUP_FACTOR * self._floor_s
        return max(self._floor_s, STEP_FACTOR * median(self._steps_s or [0.0]))

    def beat(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if not self._first:
            self._steps_s.append(now - self._last)
        self._first, self._last = False, now

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._floor_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s > self.limit_s:
                log.error("no step for %.0f s (the limit is %.0f s); ending this attempt", silent_s, self.limit_s)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HANG)
