"""The state store of one process: what was acknowledged is found again, what is damaged or void is not used."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.engine.pieces import Piece
from ddpm_dist.engine.world import World
from ddpm_dist.errors import ClaimError, DamagedStateError, StateError, StorageError, UnreachableError
from ddpm_dist.state import format as fmt, history, parts, reader
from ddpm_dist.state.cut import Cut, cut_of
from ddpm_dist.state.reader import Target, read_full, read_into, read_manifest
from ddpm_dist.state.store import StateStore
from ddpm_dist.state.writer import StateWriter
from tests.engine.worker_group import config
from tests.picky_store import PickyStore
from tools.local.s3_server import S3Server

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
SHAPES = {"a.weight": torch.Size([5, 7]), "a.bias": torch.Size([11]), "b.weight": torch.Size([3, 4, 5])}


class Fake:
    """An engine and its averages, with values that tell what they are."""

    def __init__(self, value: float = 0.0) -> None:
        self.shapes = dict(SHAPES)
        self._pieces = [
            Piece(name, shape, 0, *(torch.empty(shape.numel()) for _ in range(3))) for name, shape in SHAPES.items()
        ]
        self.averages = {"ema": [torch.empty(shape.numel()) for shape in SHAPES.values()]}
        self.steps = 0
        self.synced = 0
        self.fill(value)

    def fill(self, value: float) -> None:
        for i, tensor in enumerate(self.tensors()):
            tensor.copy_(torch.arange(tensor.numel()) * 0.37 + i + 1000 * value)
        self.steps = int(value)

    def tensors(self) -> list[Tensor]:
        moments = [t for p in self._pieces for t in (p.weights, p.exp_avg, p.exp_avg_sq)]
        return moments + self.averages["ema"]

    def pieces(self) -> list[Piece]:
        return self._pieces

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": self.steps}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.steps = scalars["optimizer_steps"]

    def sync_weights(self) -> None:
        self.synced += 1

    def fingerprint(self) -> dict[str, Any]:
        return {"world_size": 1}


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return config(f"file://{tmp_path}/run")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little tensors make several files and blocks."""
    monkeypatch.setattr(fmt, "FILE_BYTES", 512)
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 64)
    monkeypatch.setattr(reader, "RANGE_BYTES", 256)


def attempt(cfg: Config) -> tuple[StateStore, str | None]:
    store = StateStore(cfg, ALONE)
    return store, store.claim()


def save(store: StateStore, *steps: int) -> None:
    for step in steps:
        store.save(step, Fake(step), fake_averages(step), {"step": step})
        store.finish()


def fake_averages(step: int) -> Fake:
    return Fake(step)


def resume(cfg: Config) -> tuple[int, Fake]:
    """(step, what was loaded) of a new attempt."""
    store, state = attempt(cfg)
    assert state is not None
    fake = Fake(-1)
    meta = store.load(state, fake, fake)
    return meta["step"], fake


def assert_is(fake: Fake, step: int) -> None:
    expected = Fake(step)
    assert all(torch.equal(a, b) for a, b in zip(fake.tensors(), expected.tensors(), strict=True))
    assert fake.steps == step
    assert fake.synced == 1


def folder(cfg: Config) -> Path:
    return Path(cfg.run.url.removeprefix("file://")) / "checkpoints"


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


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda state: flip(sorted(state.glob("*.f32"))[1], 100),
    "missing file": lambda state: sorted(state.glob("*.f32"))[1].unlink(),
    "cut file": lambda state: cut(sorted(state.glob("*.f32"))[0]),
    "cut manifest": lambda state: cut(state / "manifest.json"),
    "flipped manifest": lambda state: flip(state / "manifest.json", 400),
    "foreign manifest": lambda state: (state / "manifest.json").write_text('{"a": 1}'),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-33])


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


def test_a_zombie_can_not_publish(cfg: Config) -> None:
    zombie, _ = attempt(cfg)
    save(zombie, 10)
    step, _ = resume(cfg)
    assert step == 10
    zombie.save(20, Fake(20), Fake(20), {"step": 20})
    with pytest.raises(ClaimError, match="attempt 2 has taken this run over from attempt 1"):
        zombie.finish()
    with pytest.raises(ClaimError):
        zombie.save(30, Fake(30), Fake(30), {"step": 30})
    assert not (folder(cfg) / "000000020-0001/manifest.json").exists()


def test_what_a_zombie_publishes_after_all_is_void_and_collected(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have looked just before it was succeeded, and have written just after."""
    zombie, _ = attempt(cfg)
    save(zombie, 10)
    heir, state = attempt(cfg)
    assert state == "000000010-0001"
    monkeypatch.setattr(history, "check_owner", lambda url, attempt: None)
    save(zombie, 20)
    monkeypatch.undo()
    save(heir, 20)
    assert sorted(path.name for path in folder(cfg).glob("0*")) == ["000000010-0001", "000000020-0002"]
    assert resume(cfg)[0] == 20


def test_of_two_that_claim_at_once_one_is_refused(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = StateStore(cfg, ALONE), StateStore(cfg, ALONE)
    claim = history.claim

    def race(*arguments: Any) -> history.Claim:
        monkeypatch.undo()
        second.claim()
        return claim(*arguments)

    monkeypatch.setattr(history, "claim", race)
    with pytest.raises(ClaimError, match="at this moment"):
        first.claim()
    assert second.attempt == 1


def test_a_claim_costs_the_same_however_many_attempts_there_were(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt wrote a state, and retention keeps one of each of the first five."""
    cfg = config(cfg.run.url, checkpoint={"keep_last": 2, "keep_every_steps": 100})
    read, reads = storage.read, []

    def counted(url: str, *arguments: Any) -> bytes:
        reads.append(url)
        return read(url, *arguments)

    monkeypatch.setattr(storage, "read", counted)
    began, counts = set(), []
    for number in range(12):
        reads.clear()
        store, _ = attempt(cfg)
        counts.append(sum("/owner/" in url for url in reads))
        began.add(store.began_at)
        save(store, 100 * number + 100 if number < 5 else 501 + number)
    assert counts == [0] + 11 * [1]
    assert len(began) == 1
    _, valid = history.read(store.url)
    assert valid == [fmt.StateId(512, 12), fmt.StateId(511, 11), *(fmt.StateId(100 * n, n) for n in (5, 4, 3, 2, 1))]


def test_claims_of_older_versions_are_read_and_continued(cfg: Config) -> None:
    """They say only what they continue; nothing that they make valid is collected."""
    for number in (1, 2, 3):
        store, _ = attempt(cfg)
        save(store, 10 * number)
        claim = folder(cfg) / "owner" / f"{number:06d}"
        record = json.loads(claim.read_text())
        claim.write_text(json.dumps({k: v for k, v in record.items() if k not in ("chain", "began")}))
    began = json.loads((folder(cfg) / "owner" / "000001").read_text())["time"]
    expected = [fmt.StateId(30, 3), fmt.StateId(20, 2)]  # keep_last is 2
    assert history.read(store.url)[1] == expected
    heir, _ = attempt(cfg)
    assert heir.began_at == began
    assert history.read(store.url)[1] == expected


def test_retention_keeps_the_last_the_regular_and_the_protected(tmp_path: Path) -> None:
    cfg = config(f"file://{tmp_path}/run", checkpoint={"keep_last": 2, "keep_every_steps": 40})
    store = StateStore(cfg, ALONE, lambda steps: {20} if 20 in steps else ())
    store.claim()
    save(store, *range(10, 110, 10))
    names = sorted(path.name for path in folder(cfg).glob("0*"))
    assert [int(name[:9]) for name in names] == [20, 40, 80, 90, 100]


def test_leftovers_of_broken_saves_are_collected(cfg: Config) -> None:
    store, _ = attempt(cfg)
    save(store, 10)
    storage.publish(storage.join(store.url, "000000020-0001", "00000-000.f32"), b"half")
    heir, _ = attempt(cfg)
    storage.publish(storage.join(store.url, "000000030-0003", "00000-000.f32"), b"of a successor")
    save(heir, 20)
    names = sorted(path.name for path in folder(cfg).glob("0*"))
    assert names == ["000000010-0001", "000000020-0002", "000000030-0003"]


def test_an_heir_gives_up_the_uploads_of_a_killed_attempt(bucket_url: str, s3_server: S3Server) -> None:
    cfg = config(f"{bucket_url}/run")
    save(attempt(cfg)[0], 10)
    client, run = s3_server.client(), f"{bucket_url}/run".split("/", 3)[3]
    for key in ("checkpoints/000000020-0001/00000-000.f32", "snapshots/000000020/unet/weights", "samples/000-0.tar"):
        client.create_multipart_upload(Bucket=s3_server.bucket, Key=f"{run}/{key}")
    attempt(cfg)
    left = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix=run)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{run}/samples/000-0.tar"], "a sampling job may be at work"


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


class Dead(BaseException):
    """The process is gone: whatever it would still do doesn't happen."""


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


def die_at(k: int, after: bool, patch: pytest.MonkeyPatch) -> None:
    """From the k-th operation that changes the store on, nothing happens any more (but that one, if `after`)."""
    done = [0]

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            number, done[0] = done[0], done[0] + 1
            if number < k:
                return operation(*arguments)
            if after and number == k:
                operation(*arguments)
            raise Dead

        return wrapped

    for name in ("publish", "create", "delete", "delete_tree"):
        patch.setattr(storage, name, wrap(getattr(storage, name)))


@pytest.fixture
def two_ranks(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    """(URL of a state written by two ranks that cut parameters in odd places, the whole weights)."""
    full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    url = f"file://{tmp_path}/states"
    cuts = {"a.weight": 13, "a.bias": 11, "b.weight": 1}
    published: list[fmt.StateId] = []
    writers = [StateWriter(url, rank, 2, published.append, lambda: None) for rank in range(2)]
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    for rank, writer in enumerate(writers):
        pieces, tensors = [], []
        for name, cut in cuts.items():
            low, high = (0, cut) if rank == 0 else (cut, SHAPES[name].numel())
            if low < high:
                pieces.append((name, low, high - low))
                tensors.append(full[name].view(-1)[low:high])
        doubled = [2 * tensor for tensor in tensors]
        writer.save(fmt.StateId(5, 1), {"weights": tensors, "ema": doubled}, pieces, shapes, {}, {})
    for writer in reversed(writers):
        writer.wait()
    assert published == [fmt.StateId(5, 1)]
    return storage.join(url, "000000005-0001"), full


def test_ranges_of_a_state_of_two_ranks(two_ranks: tuple[str, dict[str, Tensor]]) -> None:
    url, full = two_ranks
    manifest = read_manifest(url)
    for name, whole in full.items():
        for low, high in [(0, whole.numel()), (3, 4), (1, whole.numel() - 1)]:
            target = torch.zeros(high - low)
            fetched = read_into(url, manifest, [Target("ema", name, low, target)])
            assert torch.equal(target, 2 * whole.view(-1)[low:high])
            assert fetched <= 4 * (high - low) + 4 * fmt.BLOCK_BYTES, "no more than the blocks that are touched"
    for name, tensor in read_full(url, manifest, "weights"):
        assert torch.equal(tensor, full[name])
    with pytest.raises(StateError, match=r"has no 'power-0\.050'; it has weights, ema"):
        list(read_full(url, manifest, "power-0.050"))


def test_without_every_part_there_is_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PARTS_PATIENCE_S", 0.3)
    writer = StateWriter(f"file://{tmp_path}", 0, 2, lambda state: None, lambda: None)
    writer.save(fmt.StateId(5, 1), {"weights": [torch.zeros(4)]}, [("w", 0, 4)], {"w": [8]}, {}, {})
    with pytest.raises(UnreachableError):
        writer.wait()
    assert not list(tmp_path.glob("*/manifest.json"))


def write_cut(url: str, cut: Cut, full: dict[str, Tensor], odd: int | None = None) -> str:
    """URL of a state that as many ranks wrote; the pieces of rank `odd` are not what the rule says."""
    writers = [StateWriter(url, rank, cut.ranks, lambda state: None, lambda: None) for rank in range(cut.ranks)]
    shapes = {name: list(tensor.shape) for name, tensor in full.items()}
    for rank, writer in enumerate(writers):
        pieces = cut.pieces(rank)[:: -1 if rank == odd else 1]
        tensors = [full[name].view(-1)[offset : offset + numel] for name, offset, numel in pieces]
        writer.save(
            fmt.StateId(5, 1), {"weights": tensors, "ema": [2 * t for t in tensors]}, pieces, shapes, {}, {}, cut
        )
    for writer in reversed(writers):
        writer.wait()
    return storage.join(url, "000000005-0001")


@pytest.mark.parametrize("odd", [None, 3])
def test_many_ranks_hand_in_by_groups_and_by_rule(
    odd: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP", 4)
    full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    url = write_cut(f"file://{tmp_path}", cut_of(3, 10, SHAPES), full, odd)
    names = {path.name for path in tmp_path.glob("*/part*")}
    assert names == {f"part-{r:05d}.json" for r in (1, 2, 3, 5, 6, 7, 9)} | {"parts-00004.json", "parts-00008.json"}
    manifest = read_manifest(url)
    assert (manifest.cut is None) == (odd is not None)
    assert b'"pieces"' not in storage.read(f"{url}/parts-00004.json")
    assert (b'"pieces"' in storage.read(f"{url}/manifest.json")) == (odd is not None)
    for kind, factor in (("weights", 1), ("ema", 2)):
        for name, tensor in read_full(url, manifest, kind):
            assert torch.equal(tensor, factor * full[name])


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


@pytest.mark.parametrize("habit", ["condignored", "cond501"])
def test_a_store_that_can_not_create_once_is_refused_at_the_claim(
    habit: str, bucket_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(f"{bucket_url}/run")
    with PickyStore(s3_server.endpoint, habit) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        storage.clear_instances()
        with pytest.raises(StorageError, match="If-None-Match"):
            attempt(cfg)
        claims = [r for r in store.requests if r.method == "PUT" and "/owner/" in r.path]
    assert len(claims) == 2, "one create, and one that has to fail"


def test_where_nobody_may_delete_old_states_stay_with_a_warning(
    bucket_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the run goes on, and ends well."""
    cfg = config(f"{bucket_url}/run", checkpoint={"keep_last": 1})
    with PickyStore(s3_server.endpoint, "nodelete") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.clear_instances()
        store, _ = attempt(cfg)
        save(store, 10, 20, 30)
        assert store.failed_saves == 0
        assert [state.step for state in history.read(store.url)[1]] == [30, 20, 10]
    assert "old states were not removed" in caplog.text
    assert "s3:DeleteObject" in caplog.text


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
