"""Progress of a job of many units: images/s, time left, workers alive; in a log, a line every few seconds."""

import logging
import time
from collections import deque

log = logging.getLogger(__name__)

EVERY_S = 5.0
_WINDOW = 64


class Progress:
    """Counts images; the rate is that of the last units, so a pause or a lost worker shows."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done = what, total, done
        self._recent = deque([(time.monotonic(), done)], maxlen=_WINDOW)
        self._said_at = time.monotonic()

    def add(self, images: int, workers: int) -> None:
        self._done += images
        now = time.monotonic()
        self._recent.append((now, self._done))
        if now - self._said_at < EVERY_S and self._done < self._total:
            return
        self._said_at = now
        (then, before), seconds_left = self._recent[0], "?"
        rate = (self._done - before) / max(now - then, 1e-9)
        if rate:
            seconds_left = clock((self._total - self._done) / rate)
        log.info(
            "%s: %s/%s images  %.1f images/s  %s left  %d workers",
            self._what, f"{self._done:,}", f"{self._total:,}", rate, seconds_left, workers,
        )  # fmt: skip


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
