"""Steps at which copies are taken in memory: the same ones on all ranks, however unequal they are."""

import random

from ddpm_dist.training.copies import CopySteps
from tests.engine.worker_group import config


class Slots:
    """Two slots of a rank, as `StateStore.room_after` tells of them: the newest, and which are on their way."""

    def __init__(self, outlives: bool = True) -> None:
        self.outlives = outlives
        self.steps, self.busy = [0, 0], [0, 0]
        self.newest: int | None = None

    def room_after(self, copying: bool) -> bool:
        free = [slot for slot in range(2) if not self.busy[slot] and slot != self.newest]
        return (self.newest is None or not self.busy[self.newest]) if copying else bool(free)

    def take(self, step: int, busy: int) -> None:
        free = [slot for slot in range(2) if not self.busy[slot] and slot != self.newest]
        assert free or busy, "only a save may wait"
        slot = free[0] if free else 1 - (self.newest or 0)
        self.steps[slot], self.busy[slot], self.newest = step, busy, slot

    def pass_step(self) -> None:
        self.busy = [max(0, busy - 1) for busy in self.busy]


def run(every: int, save_every: int, upload_steps: list[int], steps: int) -> tuple[list[CopySteps], list[int]]:
    """Ranks whose uploads take so many steps, each of them varying; the copies taken."""
    draw = random.Random(0)
    cfg = config(checkpoint={"memory_every_steps": every, "every_steps": save_every})
    ranks = [Slots() for _ in upload_steps]
    plans = [CopySteps(cfg, slots) for slots in ranks]  # type: ignore[arg-type]
    full, copies = False, []
    for step in range(1, steps + 1):
        saving = step % save_every == 0
        told = [plan.plan(step, saving, full) for plan in plans]
        assert len({plan.now for plan in plans}) == 1
        for slots, longest in zip(ranks, upload_steps, strict=True):
            if saving or plans[0].now:
                slots.take(step, draw.randrange(1, longest + 1) if saving else 0)
        copies += [step] if plans[0].now else []
        assert len(set.intersection(*(set(slots.steps) for slots in ranks))) >= 1, "a step that all have"
        for slots in ranks:
            slots.pass_step()
        full = any(told)
    return plans, copies


def test_with_room_each_due_step_is_one() -> None:
    plans, copies = run(3, 10, [1, 1], 30)
    assert copies == [step for step in range(3, 31, 3) if step % 10]
    assert plans[0].skipped == 0
    assert run(1, 1000, [1], 20)[1] == list(range(1, 21))


def test_while_a_rank_waits_for_the_store_all_leave_them_out() -> None:
    plans, copies = run(1, 20, [2, 12, 3], 400)
    assert {plan.skipped for plan in plans} == {plans[0].skipped}
    assert plans[0].skipped > 20
    assert len(copies) > 200


def test_without_memory_or_key_no_step_is_one() -> None:
    for every, outlives in ((None, True), (1, False)):
        plan = CopySteps(config(checkpoint={"memory_every_steps": every}), Slots(outlives))  # type: ignore[arg-type]
        plan.plan(1, False, False)
        assert not plan.now
