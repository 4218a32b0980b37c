"""States in memory that outlives their writer: what an attempt goes on from, what it publishes, and what is void."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist import storage
from ddpm_dist.cluster import memory as memories
from ddpm_dist.cluster.memory import Memory, whole
from ddpm_dist.config import Config
from ddpm_dist.errors import ClaimError
from ddpm_dist.state import format as fmt, history, recall
from ddpm_dist.state.store import StateStore
from tests.engine.worker_group import config
from tests.state.tiny import ALONE, Dead, Fake, assert_is, attempt, die_at, fake_averages, resume, save

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return config(f"file://{tmp_path}/run", checkpoint={"memory_every_steps": 1})


@pytest.fixture
def descriptor() -> int:
    found = memories.create()
    assert found is not None
    return found


def held(descriptor: int) -> list[int]:
    return sorted(step for step, _ in whole(descriptor).values())


def begin(cfg: Config, descriptor: int) -> tuple[StateStore, str | None]:
    """An attempt of the one rank whose supervisor has this memory."""
    agreed = max(held(descriptor), default=None)
    store = StateStore(cfg, ALONE, memory=Memory(descriptor, agreed))
    fake = Fake(-1)
    store.prepare(fake, fake)
    return store, store.claim()


def keep(store: StateStore, *steps: int) -> None:
    for step in steps:
        assert store.room_after(False)
        store.keep(step, Fake(step), fake_averages(step), {"step": step})


def loaded(store: StateStore, state: str | None) -> tuple[int, Fake]:
    assert state is not None
    fake = Fake(-1)
    return store.load(state, fake, fake)["step"], fake


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of states that were read."""
    read, read_range, found = storage.read, storage.read_range, []

    def counted(url: str, *arguments: Any) -> bytes:
        found.extend([url] if "/owner/" not in url else [])
        return read(url, *arguments)

    def counted_range(url: str, *arguments: Any) -> bytes:
        found.append(url)
        return read_range(url, *arguments)

    monkeypatch.setattr(storage, "read", counted)
    monkeypatch.setattr(storage, "read_range", counted_range)
    return found


def test_a_copy_is_gone_on_from_without_reading_the_store_and_published_as_ones_own(
    cfg: Config, descriptor: int, reads: list[str]
) -> None:
    store, state = begin(cfg, descriptor)
    assert (state, store.outlives) == (None, True)
    save(store, 10)
    keep(store, 11, 12, 13)
    assert held(descriptor) == [12, 13]
    heir, state = begin(cfg, descriptor)
    assert (state, heir.recalled) == ("the copy of step 13 in memory", True)
    step, fake = loaded(heir, state)
    assert step == 13
    assert_is(fake, 13)
    assert reads == []
    heir.finish()
    assert held(descriptor) == [13], "what this attempt doesn't go on from is forgotten"
    _, valid = history.read(heir.url)
    assert valid == [fmt.StateId(13, 2), fmt.StateId(10, 1)]
    claim = history.read_claim(heir.url, 2)
    assert claim.continues == fmt.StateId(10, 1), "of the states in the store"
    step, fake = resume(cfg)
    assert step == 13
    assert_is(fake, 13)


def test_a_run_that_the_store_knows_nothing_of_goes_on_as_well(cfg: Config, descriptor: int) -> None:
    store, _ = begin(cfg, descriptor)
    keep(store, 1)
    heir, state = begin(cfg, descriptor)
    assert loaded(heir, state)[0] == 1
    heir.finish()
    assert resume(cfg)[0] == 1


def test_a_save_is_a_copy_as_well_and_is_not_published_twice(cfg: Config, descriptor: int, reads: list[str]) -> None:
    store, _ = begin(cfg, descriptor)
    save(store, 10)
    heir, state = begin(cfg, descriptor)
    assert_is(loaded(heir, state)[1], 10)
    heir.finish()
    assert reads == []
    assert history.read(heir.url)[1] == [fmt.StateId(10, 1)]


def test_attempts_that_come_to_nothing_between_do_no_harm(cfg: Config, descriptor: int) -> None:
    store, _ = begin(cfg, descriptor)
    keep(store, 5)
    for _ in range(3):
        assert begin(cfg, descriptor)[0].recalled
    heir, state = begin(cfg, descriptor)
    assert_is(loaded(heir, state)[1], 5)
    heir.finish()
    assert history.read(heir.url)[1] == [fmt.StateId(5, 5)]


def test_a_claim_of_somebody_else_makes_it_void(cfg: Config, descriptor: int) -> None:
    store, _ = begin(cfg, descriptor)
    save(store, 10)
    keep(store, 12)
    stranger, _ = attempt(cfg)
    with pytest.raises(ClaimError):
        store.check_owner()
    heir, state = begin(cfg, descriptor)
    assert (state, heir.recalled) == ("000000010-0001", False)
    assert held(descriptor) == []
    assert_is(loaded(heir, state)[1], 10)
    keep(heir, 11)
    assert begin(cfg, descriptor)[0].recalled, "this one's own"
    with pytest.raises(ClaimError):
        stranger.check_owner()


def test_a_newer_state_in_the_store_is_preferred(cfg: Config, descriptor: int) -> None:
    """As where ranks hold but an older step in common."""
    store, _ = begin(cfg, descriptor)
    keep(store, 5)
    save(store, 10)
    older = StateStore(cfg, ALONE, memory=Memory(descriptor, 5))
    fake = Fake(-1)
    older.prepare(fake, fake)
    state = older.claim()
    assert state == "000000010-0001"
    assert held(descriptor) == []


def test_the_newest_whole_one_and_one_on_its_way_are_never_overwritten(
    cfg: Config, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, publish = threading.Event(), storage.publish
    monkeypatch.setattr(storage, "publish", lambda *a: (gate.wait(10), publish(*a))[1])
    store, _ = begin(cfg, descriptor)
    assert store.room_after(True)
    store.save(10, Fake(10), Fake(10), {"step": 10})
    assert held(descriptor) == [10]
    assert store.room_after(False)
    assert not store.room_after(True), "10 is on its way, and 11 would be the newest"
    keep(store, 11)
    assert not store.room_after(False)
    waits = threading.Thread(target=store.keep, args=(12, Fake(12), Fake(12), {"step": 12}))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive()
    assert held(descriptor) == [10, 11]
    gate.set()
    waits.join(10)
    store.finish()
    assert held(descriptor) == [11, 12]
    assert history.latest_step(cfg.run.url) == 10
    assert_is(resume(cfg)[1], 10)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_heir_that_dies_at_any_write_loses_nothing(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each operation that changes the store: its claim, the state that it publishes, the next ones, retention."""
    monkeypatch.setattr(fmt, "FILE_BYTES", 512)
    k = 0
    while True:
        cfg = config(f"file://{tmp_path}/{k}", checkpoint={"memory_every_steps": 1})
        descriptor = memories.create()
        assert descriptor is not None
        store, _ = begin(cfg, descriptor)
        save(store, 10)
        keep(store, 13)
        with monkeypatch.context() as patch:
            die_at(k, after, patch)
            try:
                heir, state = begin(cfg, descriptor)
                loaded(heir, state)
                heir.finish()
                keep(heir, 14)
                save(heir, 20)
                keep(heir, 21)
                break
            except Dead:
                pass
        newest = max(held(descriptor))
        assert newest >= 13
        last, state = begin(cfg, descriptor)
        step, fake = loaded(last, state)
        assert step == newest
        assert_is(fake, step)
        last.finish()
        assert history.latest_step(cfg.run.url) == newest
        k += 1
    assert k >= 12, "a claim, two saves of several files, and retention"


def test_without_room_it_says_how_much_is_missing_and_goes_on_without(
    cfg: Config, descriptor: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recall, "available_bytes", lambda: 1 << 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with caplog.at_level(logging.WARNING):
        store, _ = begin(cfg, descriptor)
    assert not store.outlives
    elements = sum(piece.numel for piece in Fake().pieces())
    said = f"take 0.00 GiB of this node's memory (3 ranks, each 8 bytes × 4 kinds × {elements:,} elements)"
    assert said in caplog.text
    save(store, 10)
    assert_is(resume(cfg)[1], 10)
    assert held(descriptor) == []


def test_what_is_held_already_needs_no_further_room(
    cfg: Config, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = begin(cfg, descriptor)
    keep(store, 1, 2)
    monkeypatch.setattr(recall, "available_bytes", lambda: 0)
    assert begin(cfg, descriptor)[0].recalled


def test_a_copy_of_another_layout_is_left(cfg: Config, descriptor: int) -> None:
    store, _ = begin(cfg, descriptor)
    save(store, 10)
    keep(store, 11)
    other = Fake(-1)
    other.averages = {"power-0.050": other.averages["ema"]}
    heir = StateStore(cfg, ALONE, memory=Memory(descriptor, 11))
    heir.prepare(other, other)
    assert heir.claim() == "000000010-0001"
    assert held(descriptor) == []


def test_pages_are_touched_once_and_never_those_of_a_copy(cfg: Config, descriptor: int) -> None:
    store, _ = begin(cfg, descriptor)
    keep(store, 1, 2)
    copies = store._writer.copies
    copies.touch(sum(t.numel() for t in Fake().tensors()), Fake().tensors()[0])
    for copy, (step, _) in zip(copies._all, sorted(whole(descriptor).values()), strict=True):
        assert copy.tensor is not None
        assert copy.tensor[0] == 1000 * step, "weights come first"
