"""How far a long piece of work is: a bar on a terminal, in a log a line every few seconds."""

import logging
import sys
import time
from collections import deque
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_S = 5.0
_WINDOW = 64


class Progress:
    """Says how much is done, at which rate, and how long the rest takes; to be used as a context.

    The rate is that of the last results, so that a pause or a lost worker shows, and counts from the first one on:
    before it, processes start and inputs are opened.
    """

    def __init__(self, what: str, noun: str, total: int, done: int = 0) -> None:
        self._what, self._noun, self._total, self._done = what, noun, total, done
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._said_at = time.monotonic()
        self._bar = _bar(total, done, noun, what)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1, note: str = "") -> None:
        """So many more are done; `note` ends the line."""
        self._done += count
        now = time.monotonic()
        self._recent.append((now, self._done))
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._done >= self._total or (len(self._recent) > 1 and now - self._said_at >= EVERY_S):
            self._said_at = now
            log.info("%s", self._line(now, note))

    def _line(self, now: float, note: str) -> str:
        parts = [f"{self._done:,} of {counted(self._total, self._noun)}"]
        since, before = self._recent[0]
        if now > since:
            rate = (self._done - before) / (now - since)
            left = clock((self._total - self._done) / rate) if rate else "?"
            parts += [f"{rate:.1f}/s", f"{left} left"]
        return f"{self._what}: {', '.join([*parts, *([note] if note else [])])}"


class StepProgress:
    """The same of a training, which says itself when it wants a line."""

    def __init__(self, start_step: int, steps: int, global_batch: int) -> None:
        self._steps, self._batch = steps, global_batch
        self._start_step, self._start = start_step, time.perf_counter()
        self._bar = _bar(steps, start_step, "step")

    def show(self, step: int, loss: float | None, images_per_second: float, data_wait: float) -> None:
        """step: steps done. loss: None if none was heard of yet. data_wait: share of the time."""
        loss_text = "" if loss is None else f"loss {loss:.4f}  "
        if self._bar is not None:
            self._bar.set_postfix_str(f"{loss_text}{images_per_second:.0f} images/s, wait {data_wait:.1%}")
            self._bar.update(step - self._bar.n)
            return
        rate = (step - self._start_step) / max(time.perf_counter() - self._start, 1e-9)
        log.info(
            "step %d/%d (%s images)  %s%.0f images/s  data wait %.1f%%  %s left",
            step, self._steps, f"{step * self._batch:,}", loss_text, images_per_second, 100 * data_wait,
            clock((self._steps - step) / rate) if rate else "?",
        )  # fmt: skip

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _bar(total: int, done: int, noun: str, what: str | None = None) -> "tqdm[None] | None":
    """On a terminal, else None."""
    return tqdm(total=total, initial=done, unit=noun, desc=what) if sys.stderr.isatty() else None


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
