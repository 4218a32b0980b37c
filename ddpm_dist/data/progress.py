"""How far a long piece of work is: a line in the log every few seconds."""

import logging
import time

log = logging.getLogger(__name__)

PROGRESS_S = 5.0


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Progress:
    """Says how much is done, at which rate, and how long the rest takes.

    The rate counts from the first result on: before it, processes start and inputs are opened.
    """

    def __init__(self, who: str, noun: str, total: int, done: int = 0) -> None:
        self._who, self._noun, self._total, self._done = who, noun, total, done
        self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._done
        elif now - self._shown > PROGRESS_S:
            self._shown = now
            log.info("%s", self.line(now))

    def line(self, now: float) -> str:
        """What is said at a time, in seconds of the monotonic clock, after the first result."""
        assert self._first is not None
        since, before = self._first
        rate = (self._done - before) / (now - since)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "stalled"
        return f"{self._who}: {self._done} of {counted(self._total, self._noun)}, {rate:.1f}/s, {left}"
