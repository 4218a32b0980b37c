"""A real job on the real S3 server, killed with SIGKILL and started again, ends with the same bytes."""

import json
import random
from pathlib import Path

import pytest

from ddpm_dist import storage
from tests.integration import jobs

STEPS = 24


def overrides(run_url: str, data_url: str) -> list[str]:
    return [f"run.url={run_url}", f"data.url={data_url}", f"train.steps={STEPS}", "cluster.workers=2", *jobs.SMALL]


@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_unbroken(bucket_url: str, tmp_path: Path) -> None:
    data_url, log = f"{bucket_url}/data", tmp_path / "log"
    jobs.make_digits(data_url)
    unbroken, broken = f"{bucket_url}/unbroken", f"{bucket_url}/broken"
    jobs.finish(jobs.deepspeed("configs/digits.yaml", overrides(unbroken, data_url), log), log)

    for at in sorted(random.sample(range(1, STEPS), 2)):
        job = jobs.deepspeed("configs/digits.yaml", overrides(broken, data_url), log)
        jobs.wait_until(jobs.state_reached(broken, at // 4 * 4 or 4), job, log)
        jobs.kill_group(job)
    jobs.finish(jobs.deepspeed("configs/digits.yaml", overrides(broken, data_url), log), log)

    assert jobs.weights_sha256(broken, STEPS) == jobs.weights_sha256(unbroken, STEPS)
    text = log.read_text()
    assert "continuing at step" in text
    assert "Traceback" not in text, text[-4000:]


def test_a_finished_run_says_so_and_grows(bucket_url: str, tmp_path: Path) -> None:
    data_url, run_url, log = f"{bucket_url}/data", f"{bucket_url}/run", tmp_path / "log"
    jobs.make_digits(data_url)
    short = [*overrides(run_url, data_url), "train.steps=8"]
    jobs.finish(jobs.deepspeed("configs/digits.yaml", short, log, workers=1), log)
    before = storage.list_objects(f"{run_url}/checkpoints")
    jobs.finish(jobs.deepspeed("configs/digits.yaml", short, log, workers=1), log)
    assert "finished at step 8" in log.read_text()
    assert storage.list_objects(f"{run_url}/checkpoints") == before
    jobs.finish(jobs.deepspeed("configs/digits.yaml", [*short, "train.steps=12"], log, workers=1), log)
    assert "train.steps: 8 -> 12" in log.read_text()
    assert jobs.weights_sha256(run_url, 12)


def test_a_kill_between_the_last_state_and_its_snapshot_loses_nothing(bucket_url: str, tmp_path: Path) -> None:
    data_url, run_url, log = f"{bucket_url}/data", f"{bucket_url}/run", tmp_path / "log"
    jobs.make_digits(data_url)
    short = [*overrides(run_url, data_url), "train.steps=8"]
    jobs.finish(jobs.deepspeed("configs/digits.yaml", short, log, workers=1), log)
    before = jobs.weights_sha256(run_url, 8)
    storage.delete_tree(f"{run_url}/snapshots/000000008")
    storage.publish(f"{run_url}/summary.json", b'{"step": 4}')  # that of an attempt before
    jobs.finish(jobs.deepspeed("configs/digits.yaml", short, log, workers=2), log)
    assert jobs.weights_sha256(run_url, 8) == before
    assert json.loads(storage.read(f"{run_url}/summary.json"))["step"] == 8


def test_a_stop_object_ends_the_run_with_a_state(bucket_url: str, tmp_path: Path) -> None:
    data_url, run_url, log = f"{bucket_url}/data", f"{bucket_url}/run", tmp_path / "log"
    jobs.make_digits(data_url)
    endless = [*overrides(run_url, data_url), "train.steps=1000000"]
    job = jobs.deepspeed("configs/digits.yaml", endless, log, workers=1)
    jobs.wait_until(jobs.state_reached(run_url, 4), job, log)
    storage.publish(f"{run_url}/stop", b"")
    jobs.finish(job, log)
    assert "stopped at step" in log.read_text()
    assert not storage.exists(f"{run_url}/stop")
