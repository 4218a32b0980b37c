"""Whose states count: zombies, claims at once, retention, and what broken attempts left."""

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.errors import ClaimError, StorageError
from ddpm_dist.state import format as fmt, history
from ddpm_dist.state.store import StateStore
from tests.engine.worker_group import config
from tests.picky_store import PickyStore
from tests.state.tiny import ALONE, Fake, attempt, folder, resume, save
from tools.local.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("small_files")


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
