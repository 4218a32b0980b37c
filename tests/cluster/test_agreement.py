"""The supervisors' agreement, as plain coroutines: who joins what, what ends an attempt, and when there is no other."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from ddpm_dist.cluster.agreement import FIRST_PAUSE_S, Agreement


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    return list(await asyncio.wait_for(asyncio.gather(*calls), 10))


async def begin(agreement: Agreement, group: str = "a", size: int = 2) -> dict[str, Any]:
    joined = await together(*(agreement.join(group, rank, size, f"{group}{rank}") for rank in range(size)))
    assert all(found == joined[0] for found in joined)
    assert joined[0]["master"] == f"{group}0"
    return dict(joined[0])


async def pending(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Started, and waiting."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.02)
    assert not task.done()
    return task


def test_an_attempt_begins_when_all_are_there_and_ends_when_all_have_finished() -> None:
    async def run() -> None:
        agreement = Agreement(10)
        first = await pending(agreement.join("a", 1, 2, None))
        joined = {"number": 1, "master": "port", "pause_s": 0.0, "failed_at": None, "held": None}
        assert await agreement.join("a", 0, 2, "port") == joined
        assert await first == joined
        early = await pending(agreement.finished(1, 1, False))
        assert await agreement.finished(1, 0, False) == "done"
        assert await early == "done"

    asyncio.run(run())


def test_the_first_failure_ends_an_attempt_for_all_and_counts_once() -> None:
    async def run() -> None:
        agreement = Agreement(2)
        for number in (1, 2):
            assert (await begin(agreement))["number"] == number
            watching = await pending(agreement.watch(number))
            assert await agreement.failed(number, 1, "SIGKILL", True) is None
            assert await agreement.failed(number, 0, "a peer left", True) is None, "a consequence"
            assert await asyncio.wait_for(watching, 10) == "rank 1: SIGKILL"
            assert await agreement.watch(number) == "rank 1: SIGKILL"
        await begin(agreement)
        text = await agreement.failed(3, 0, "SIGKILL", True)
        assert text == "SIGKILL; given up after 3 failures, as cluster.max_failures says"

    asyncio.run(run())


def test_a_restart_counts_from_the_end_of_the_attempt_before() -> None:
    """Of the first that made a group, if those between never did."""

    async def run() -> None:
        agreement = Agreement(10)
        assert (await begin(agreement))["failed_at"] is None
        before = time.time()
        await agreement.failed(1, 1, "SIGKILL", True)
        after = time.time()
        lonely = await pending(agreement.join("a", 0, 2, None))
        await asyncio.sleep(0.02)
        found = (await begin(agreement, "b"))["failed_at"]
        assert before <= found <= after
        assert await lonely is None
        await agreement.ray_failed()
        assert (await begin(agreement, "c"))["failed_at"] > after

    asyncio.run(run())


def test_the_newest_copy_that_all_hold_is_agreed_on() -> None:
    async def run() -> None:
        agreement = Agreement(-1)
        for held, newest in (([[5, 10], [10, 15]], 10), ([[5], []], None), ([[5, 10], [10, 5]], 10)):
            joined = await together(*(agreement.join("a", rank, 2, rank, steps) for rank, steps in enumerate(held)))
            assert [one["held"] for one in joined] == [newest, newest]
            await agreement.failed(joined[0]["number"], 0, "SIGKILL", True)

    asyncio.run(run())


def test_no_limit_and_ray_counts_along() -> None:
    async def run() -> None:
        endless = Agreement(-1)
        for number in range(1, 20):
            await begin(endless)
            assert await endless.failed(number, 0, "SIGKILL", True) is None
        limited = Agreement(1)
        await begin(limited)
        assert await limited.failed(1, 0, "a peer left", True) is None
        assert await limited.ray_failed(), "of the same loss"
        waiting = await pending(limited.join("a", 0, 2, None))
        assert await limited.ray_failed(), "while some wait for those that are lost"
        await begin(limited, "b")
        assert await waiting is None
        assert not await limited.ray_failed()
        assert await limited.failed(3, 0, "a peer left", True) is not None, "told of by both, the other way round"

    asyncio.run(run())


def test_who_has_finished_runs_again_where_another_fails_in_its_last_moments() -> None:
    async def run() -> None:
        agreement = Agreement(10)
        await begin(agreement)
        finished = await pending(agreement.finished(1, 0, False))
        await agreement.failed(1, 1, "SIGKILL", True)
        assert await asyncio.wait_for(finished, 10) == "again"
        assert (await begin(agreement))["number"] == 2
        assert await agreement.finished(1, 0, False) == "again", "of an attempt that is long over"
        assert await agreement.failed(1, 0, "late", True) is None

    asyncio.run(run())


def test_a_preemption_waits_for_all_to_have_saved() -> None:
    async def run() -> None:
        agreement = Agreement(0)
        await begin(agreement)
        first = await pending(agreement.finished(1, 1, True))
        assert await agreement.finished(1, 0, True) == "preempted"
        assert await first == "preempted"

    asyncio.run(run())


def test_attempts_without_a_step_follow_more_and_more_slowly() -> None:
    async def run() -> None:
        agreement = Agreement(-1)
        pauses = []
        for number, stepped in enumerate((False, False, False, True, True), 1):
            pauses.append((await begin(agreement))["pause_s"])
            await agreement.failed(number, 0, "SIGKILL", stepped)
        assert pauses == [0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 0]

    asyncio.run(run())


def test_a_new_worker_group_takes_the_place_of_the_one_before() -> None:
    """Also of another size, and while somebody of the old one still waits for its peers."""

    async def run() -> None:
        agreement = Agreement(10)
        await begin(agreement)
        watching = await pending(agreement.watch(1))
        await agreement.failed(1, 1, "SIGKILL", True)
        await watching
        lonely = await pending(agreement.join("a", 0, 2, None))
        newer = await begin(agreement, "b", 3)
        assert newer["master"] == "b0"
        assert await asyncio.wait_for(lonely, 10) is None
        assert await agreement.join("a", 1, 2, None) is None, "never paired with the new ones"
        finishing = await pending(agreement.finished(newer["number"], 0, False))
        await begin(agreement, "c", 1)
        assert await asyncio.wait_for(finishing, 10) == "again"

    asyncio.run(run())
