"""A real job on the real S3 server, killed and started again, ends with the same bytes; and how runs end."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.state.history import latest_step
from tests.integration import jobs, loop_ranks as loop

STEPS = 24


def overrides(run_url: str, data_url: str) -> list[str]:
    return [f"run.url={run_url}", f"data.url={data_url}", f"train.steps={STEPS}", "cluster.workers=2", *jobs.SMALL]


@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_unbroken(bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_url, log, temp = f"{bucket_url}/data", tmp_path / "log", tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    jobs.make_digits(data_url)
    unbroken, broken = f"{bucket_url}/unbroken", f"{bucket_url}/broken"
    jobs.finish(jobs.deepspeed("configs/digits.yaml", overrides(unbroken, data_url), log), log)

    for at in sorted(random.sample(range(1, STEPS), 2)):
        job = jobs.deepspeed("configs/digits.yaml", overrides(broken, data_url), log)
        jobs.wait_until(jobs.state_reached(broken, at // 4 * 4 or 4), job, log)
        jobs.kill_group(job)
        assert list(temp.glob("ddpm_dist-events-*")), "the event files of rank 0"
    jobs.finish(jobs.deepspeed("configs/digits.yaml", overrides(broken, data_url), log), log)

    assert jobs.weights_sha256(broken, STEPS) == jobs.weights_sha256(unbroken, STEPS)
    text = log.read_text()
    assert "continuing at step" in text
    assert "Traceback" not in text, text[-4000:]
    assert not list(temp.glob("ddpm*")), "what kills left is gone"


def log_of(folder: Path) -> str:
    """What rank 0 of a recorded attempt has said."""
    return (folder / "log-0").read_text()


def test_a_finished_run_says_so_and_grows(data_url: str, bucket_url: str, tmp_path: Path) -> None:
    run_url = f"{bucket_url}/run"
    loop.finish(loop.config(run_url, data_url, "train.steps=8"), 1)
    before = storage.list_objects(f"{run_url}/checkpoints")
    loop.finish(loop.config(run_url, data_url, "train.steps=8"), 1)
    assert storage.list_objects(f"{run_url}/checkpoints") == before
    loop.finish(loop.config(run_url, data_url, "train.steps=12"), 1, loop.Faults(record=str(tmp_path)))
    assert "train.steps: 8 -> 12" in log_of(tmp_path)
    assert jobs.weights_sha256(run_url, 12)


def test_a_kill_between_the_last_state_and_its_snapshot_loses_nothing(data_url: str, bucket_url: str) -> None:
    run_url = f"{bucket_url}/run"
    cfg = loop.config(run_url, data_url, "train.steps=8")
    loop.finish(cfg, 1)
    before = jobs.weights_sha256(run_url, 8)
    storage.delete_tree(f"{run_url}/snapshots/000000008")
    storage.publish(f"{run_url}/summary.json", b'{"step": 4}')  # that of an attempt before
    loop.finish(cfg, 2)
    assert jobs.weights_sha256(run_url, 8) == before
    assert json.loads(storage.read(f"{run_url}/summary.json"))["step"] == 8


def test_a_stop_object_ends_the_run_with_a_state(data_url: str, bucket_url: str, tmp_path: Path) -> None:
    run_url = f"{bucket_url}/run"
    cfg = loop.config(run_url, data_url, "train.steps=1000000")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.finish, cfg, 1, loop.Faults(record=str(tmp_path)))
        while not running.done() and (latest_step(run_url) or 0) < 4:
            time.sleep(0.05)
        storage.publish(f"{run_url}/stop", b"")
        running.result(120)
    assert "stopped at step" in log_of(tmp_path)
    assert not storage.exists(f"{run_url}/stop")
