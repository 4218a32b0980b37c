"""The supervisors' agreement on attempts: a small asynchronous actor beside the driver.

An attempt is a number that all ranks of a worker group have in common. It begins when all of them have joined, and is
over when one of them fails, or when all have finished. Ray's own restarts bring a new worker group, whose coming ends
what the old one was at.
"""

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
"""Before an attempt that follows one without a single step; doubled each time."""


@dataclass
class _Attempt:
    number: int
    began: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    members: dict[int, Any] = field(default_factory=dict)
    """rank -> its endpoint."""
    held: dict[int, set[int]] = field(default_factory=dict)
    """rank -> steps whose copies it has in memory."""
    finished: dict[int, bool] = field(default_factory=dict)
    """rank -> whether it left because a node is about to go away."""
    reason: str | None = None
    """Why it is over."""
    pause_s: float = 0.0
    ended: bool = False


class Agreement:
    """max_failures: as cluster.max_failures; -1: no limit."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0
        self._counted = -1
        """Number of the attempt whose failure was counted last: the supervisors and Ray may both tell of one."""
        self._fruitless = 0
        self._group, self._size = "", 0
        self._old: set[str] = set()
        self._attempt = _Attempt(0)
        self._over_at: float | None = None
        """Unix time at which the newest attempt that is over was."""

    async def join(
        self, group: str, rank: int, size: int, endpoint: Any, held: Collection[int] = ()
    ) -> dict[str, Any] | None:
        """Waits for all ranks of the group: {"number", "master": rank 0's endpoint, "pause_s", "failed_at", "held"}.

        failed_at: Unix time at which the attempt before was over; None for the first. held: steps whose copies a rank
        has in memory; in the result, the newest that all have, or None. The result is None for a group that Ray has
        replaced: it is about to be ended.
        """
        if group in self._old:
            return None
        if group != self._group:
            self._old.add(self._group)
            self._group, self._size = group, size
            await self._next("another worker group has come")
        attempt = self._attempt
        if attempt.reason is not None:
            attempt = await self._next(attempt.reason)
        attempt.members[rank], attempt.held[rank] = endpoint, set(held)
        if len(attempt.members) == self._size:
            attempt.began.set()
        await attempt.began.wait()
        if attempt is not self._attempt and group != self._group:
            return None
        return {
            "number": attempt.number,
            "master": attempt.members[0],
            "pause_s": attempt.pause_s,
            "failed_at": self._over_at,
            "held": max(set.intersection(*attempt.held.values()), default=None),
        }

    async def watch(self, number: int) -> str:
        """Returns when an attempt is over, with the reason."""
        attempt = self._attempt
        if attempt.number != number:
            return "it is over"
        async with attempt.changed:
            await attempt.changed.wait_for(lambda: attempt.reason is not None)
        return str(attempt.reason)

    async def failed(self, number: int, rank: int, reason: str, made_a_step: bool) -> str | None:
        """A rank has ended badly, so the attempt is over; why there won't be another one, if so.

        Of an attempt only the first failure counts: the others are its consequence.
        """
        attempt = self._attempt
        if attempt.number != number or attempt.reason is not None:
            return None
        self._count(number)
        self._fruitless = 0 if made_a_step else self._fruitless + 1
        await self._over(attempt, f"rank {rank}: {reason}")
        if self._exhausted():
            return f"{reason}; given up after {self._failures} failures, as cluster.max_failures says"
        return None

    async def finished(self, number: int, rank: int, preempted: bool) -> str:
        """Waits for the others: "done", "preempted", or "again", as one of them failed in its last moments."""
        attempt = self._attempt
        if attempt.number != number:
            return "again"
        async with attempt.changed:
            attempt.finished[rank] = preempted
            attempt.changed.notify_all()
            await attempt.changed.wait_for(lambda: attempt.reason is not None or len(attempt.finished) == self._size)
        if attempt.reason is not None:
            return "again"
        self._ends(attempt)
        return "preempted" if any(attempt.finished.values()) else "done"

    async def ray_failed(self) -> bool:
        """A worker group was lost, which Ray counts; whether there may be another one."""
        attempt = self._attempt
        self._ends(attempt)
        self._count(attempt.number if attempt.began.is_set() else attempt.number - 1)
        return not self._exhausted()

    def _ends(self, attempt: _Attempt) -> None:
        """One that never began leaves the time at which the one before was over."""
        if attempt.began.is_set() and not attempt.ended:
            attempt.ended, self._over_at = True, time.time()

    def _count(self, number: int) -> None:
        if number != self._counted:
            self._failures, self._counted = self._failures + 1, number

    def _exhausted(self) -> bool:
        return 0 <= self._max_failures < self._failures

    async def _over(self, attempt: _Attempt, reason: str) -> None:
        async with attempt.changed:
            attempt.reason = reason
            self._ends(attempt)
            attempt.changed.notify_all()

    async def _next(self, reason: str) -> _Attempt:
        """The attempt after the present one, which is over."""
        old = self._attempt
        self._attempt = _Attempt(old.number + 1)
        if self._fruitless:
            self._attempt.pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._fruitless - 1))
        if old.reason is None:
            await self._over(old, reason)
        old.began.set()
        return self._attempt
