"""Memory that outlives its writer: what was whole is found, whole, wherever the writer was killed."""

import hashlib
import os
import random
import signal
import time

import pytest

from ddpm_dist.cluster import memory as memories
from ddpm_dist.cluster.memory import PAGE, SLOTS, Memory, whole

SIZE = 3 * PAGE + 100


@pytest.fixture
def descriptor() -> int:
    found = memories.create()
    assert found is not None
    return found


def fill(memory: Memory, data: memoryview, slot: int, number: int) -> None:
    memory.begin(slot)
    data[:] = bytes([number % 251]) * len(data)
    memory.commit(slot, number, f"step {number}".encode())


def test_it_has_no_name_and_costs_what_was_written(descriptor: int) -> None:
    assert os.fstat(descriptor).st_nlink == 0
    memory = Memory(descriptor, None)
    datas = memory.open(SIZE)
    assert [len(data) for data in datas] == SLOTS * [4 * PAGE], "whole pages"
    assert memory.held_bytes <= PAGE
    for slot, data in enumerate(datas):
        fill(memory, data, slot, slot)
    assert memory.held_bytes <= 11 * PAGE, "the head, the data and a page of text each"
    memory.drop()
    assert memory.held_bytes <= PAGE
    assert whole(descriptor) == {}


def test_what_is_whole_is_seen_by_who_comes_after(descriptor: int) -> None:
    assert whole(descriptor) == {}, "before anybody wrote"
    memory = Memory(descriptor, None)
    datas = memory.open(SIZE)
    fill(memory, datas[0], 0, 5)
    fill(memory, datas[1], 1, 10)
    assert whole(descriptor) == {0: (5, b"step 5"), 1: (10, b"step 10")}
    memory.begin(0)
    heir = Memory(descriptor, 10)
    assert heir.open(SIZE)[1][:] == bytes([10]) * 4 * PAGE
    assert heir.whole() == {1: (10, b"step 10")}
    heir.open(SIZE + 4 * PAGE)
    assert heir.whole() == {}, "of another size"


def test_a_head_or_text_that_was_cut_off_counts_for_nothing(descriptor: int) -> None:
    memory = Memory(descriptor, None)
    fill(memory, memory.open(SIZE)[0], 0, 5)
    for at in (64 + 1, 64 + 21, PAGE + 4 * PAGE):
        before = os.pread(descriptor, 1, at)
        os.pwrite(descriptor, bytes([before[0] ^ 1]), at)
        assert whole(descriptor) == {}
        os.pwrite(descriptor, before, at)
    assert len(whole(descriptor)) == 1


def test_a_note_stays_whatever_becomes_of_the_slots(descriptor: int) -> None:
    memory = Memory(descriptor, None)
    assert memory.note == b""
    memory.note = b"before all"
    memory.open(SIZE)
    assert memory.note == b"before all"
    memory.note = b"short"
    memory.open(2 * SIZE)
    assert Memory(descriptor, None).note == b"short"
    memory.drop()
    assert memory.note == b"short"


@pytest.mark.timeout(120)
def test_a_writer_that_is_killed_anywhere_leaves_the_newest_whole_one(descriptor: int) -> None:
    """SIGKILL at random, many times, to a process that writes to both slots in turn."""
    draw, size = random.Random(0), 1 << 18
    Memory(descriptor, None).open(size)
    seen = 0
    for _ in range(25):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _write_for_ever(descriptor, size, seen, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        time.sleep(draw.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(ours, "rb") as told:
            last = max(seen, len(told.read()) + seen)
        found = whole(descriptor)
        datas = Memory(descriptor, None).open(size)
        for slot, (number, text) in found.items():
            assert hashlib.sha256(datas[slot]).hexdigest() == text.decode(), number
        if last:
            newest = max(number for number, _ in found.values())
            assert newest in (last, last + 1), "the last one that it told of, or one that it had no time to tell of"
            seen = newest
    assert seen > 25


def _write_for_ever(descriptor: int, size: int, number: int, told: int) -> None:
    memory = Memory(descriptor, None)
    datas = memory.open(size)
    newest = max(memory.whole().items(), key=lambda item: item[1][0], default=(1, (0, b"")))[0]
    while True:
        number, newest = number + 1, 1 - newest
        data = random.Random(number).randbytes(size)
        memory.begin(newest)
        datas[newest][:] = data
        memory.commit(newest, number, hashlib.sha256(data).hexdigest().encode())
        os.write(told, b"x")
