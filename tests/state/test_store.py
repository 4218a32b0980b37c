"""The state store of one process: what was acknowledged is found again, what is damaged or void is not used."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.errors import DamagedStateError, StateError, StorageError, UnreachableError
from ddpm_dist.state import format as fmt, history
from ddpm_dist.state.reader import read_full, read_manifest
from ddpm_dist.state.store import StateStore
from tests.engine.worker_group import config
from tests.state.tiny import Dead, Fake, assert_is, attempt, cut, die_at, flip, folder, resume, save
from tools.local.s3_server import S3Server

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda state: flip(sorted(state.glob("*.f32"))[1], 100),
    "missing file": lambda state: sorted(state.glob("*.f32"))[1].unlink(),
    "cut file": lambda state: cut(sorted(state.glob("*.f32"))[0]),
    "cut manifest": lambda state: cut(state / "manifest.json"),
    "flipped manifest": lambda state: flip(state / "manifest.json", 400),
    "foreign manifest": lambda state: (state / "manifest.json").write_text('{"a": 1}'),
}
pytestmark = pytest.mark.usefixtures("small_files")


def test_a_new_run_has_no_state_and_a_saved_one_comes_back(cfg: Config) -> None:
    store, state = attempt(cfg)
    assert (state, store.attempt) == (None, 1)
    save(store, 10, 20)
    again, state = attempt(cfg)
    assert (state, again.attempt) == ("000000020-0001", 2)
    fake = Fake(-1)
    meta = again.load(state or "", fake, fake)
    assert_is(fake, 20)
    assert meta["step"] == 20
    assert meta["seed"] == cfg.run.seed
    assert meta["attempt"] == 1
    assert meta["saved_at"] > 0
    assert "train:" in meta["config"]


def test_saving_takes_a_copy_and_returns(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    publish = storage.publish
    monkeypatch.setattr(storage, "publish", lambda *a: (gate.wait(10), publish(*a))[1])
    store, _ = attempt(cfg)
    fake = Fake(1)
    store.save(1, fake, fake, {"step": 1})
    fake.fill(99)
    store.save(2, Fake(2), Fake(2), {"step": 2})  # the second buffer
    gate.set()
    store.finish()
    monkeypatch.undo()
    assert read_manifest(storage.join(store.url, "000000001-0001")).meta["step"] == 1
    full = dict(read_full_of(store, "000000001-0001", "weights"))
    assert torch.equal(full["a.bias"], Fake(1).pieces()[1].weights)


def read_full_of(store: StateStore, state: str, kind: str) -> Iterator[tuple[str, Tensor]]:
    url = storage.join(store.url, state)
    return read_full(url, read_manifest(url), kind)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_by_name_and_the_one_before_is_used(
    damage: str, cfg: Config, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = attempt(cfg)
    save(store, 10, 20)
    DAMAGES[damage](folder(cfg) / "000000020-0001")
    with caplog.at_level(logging.ERROR):
        step, fake = resume(cfg)
    assert step == 10
    assert_is(fake, 10)
    assert "000000020-0001" in caplog.text
    claims, valid = history.read(store.url)
    assert claims[max(claims)] == fmt.StateId(10, 1)
    assert valid == [fmt.StateId(10, 1)], "the damaged one is no longer part of the run"


def test_when_all_states_are_damaged_the_run_stops_instead_of_beginning_anew(cfg: Config) -> None:
    store, _ = attempt(cfg)
    save(store, 10, 20)
    for state in folder(cfg).glob("0*"):
        cut(state / "manifest.json")
    with pytest.raises(StateError, match="all states before it are damaged"):
        resume(cfg)
    with pytest.raises(StateError, match="all states before it are damaged"):
        resume(cfg)


def test_a_state_of_another_network_is_refused(cfg: Config) -> None:
    store, _ = attempt(cfg)
    save(store, 10)
    again, state = attempt(cfg)
    other = Fake()
    other.shapes["a.bias"] = torch.Size([12])
    with pytest.raises(StateError, match=r"another network .*a.bias: \[11\] there, \[12\] here") as error:
        again.load(state or "", other, other)
    assert not isinstance(error.value, DamagedStateError)


def test_an_outage_is_survived_and_counted(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = attempt(cfg)
    save(store, 10)

    def down(*_: object) -> None:
        raise UnreachableError("the store doesn't answer")

    monkeypatch.setattr(storage, "publish", down)
    store.save(20, Fake(20), Fake(20), {"step": 20})
    with pytest.raises(UnreachableError, match="the last state could not be written"):
        store.finish()
    monkeypatch.undo()
    assert store.failed_saves == 1
    save(store, 30)
    assert resume(cfg)[0] == 30


def test_an_error_that_waiting_does_not_cure_reaches_the_training(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = attempt(cfg)

    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(storage, "publish", full)
    store.save(20, Fake(20), Fake(20), {"step": 20})
    with pytest.raises(StorageError, match="No space left"):
        store.finish()
    with pytest.raises(StorageError, match="No space left"):
        store.poll()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_save_that_dies_at_any_write_leaves_a_whole_state(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at the k-th operation that changes the store, before or after it took effect, for every k."""
    k = 0
    while True:
        cfg = config(f"file://{tmp_path}/{k}")
        store, _ = attempt(cfg)
        save(store, 10, 20)
        with monkeypatch.context() as patch:
            die_at(k, after, patch)
            try:
                heir, state = attempt(cfg)
                fake = Fake(-1)
                heir.load(state or "", fake, fake)
                save(heir, 30, 40)
                break
            except Dead:
                pass
        step, fake = resume(cfg)
        assert step in (20, 30, 40)
        assert_is(fake, step)
        k += 1
    assert k >= 15, "a claim, two saves of several files, and retention"


def test_on_a_real_s3_server(bucket_url: str) -> None:
    cfg = config(f"{bucket_url}/run", checkpoint={"keep_last": 2})
    store, _ = attempt(cfg)
    save(store, 10, 20, 30)
    step, fake = resume(cfg)
    assert step == 30
    assert_is(fake, 30)
    _, valid = history.read(store.url)
    assert valid == [fmt.StateId(30, 1), fmt.StateId(20, 1)]
    folders = {path.split("/")[0] for path in storage.list_objects(store.url)}
    assert sorted(folders) == ["000000020-0001", "000000030-0001", "owner"]


def test_an_outage_of_the_server_during_a_save_only_delays_it(s3_server: S3Server, bucket_url: str) -> None:
    cfg = config(f"{bucket_url}/run")
    store, _ = attempt(cfg)
    save(store, 10)
    s3_server.kill()
    store.save(20, Fake(20), Fake(20), {"step": 20})  # returns at once, while nobody answers
    time.sleep(2.0)
    s3_server.restart()
    store.finish()
    assert store.failed_saves == 0
    step, fake = resume(cfg)
    assert step == 20
    assert_is(fake, 20)
