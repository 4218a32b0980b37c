"""Who dies and who notices, under Ray: ranks, supervisors and standbys as victims. The bytes are the unbroken run's."""

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_dist import storage
from ddpm_dist.state.history import latest_step
from tests.integration import loop_ranks as loop
from tests.integration.test_ray_failures import Job, attempts, ended, unbroken
from tests.ray_local import RayCluster
from tools.local.s3_server import S3Server

RANK, SUPERVISOR, STANDBY = "ddpm_dist rank", "ray::RayTrainWorker", "ddpm_dist standby"


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """One node with two CPUs."""
    running = RayCluster(2, s3_server.env)
    yield running
    running.close()


def stop(run_url: str, job: Job) -> str:
    storage.publish(f"{run_url}/stop", b"")
    return job.finish()


def check_bits(run_url: str, data_url: str, reference: str, ranks: int) -> None:
    last = latest_step(run_url)
    assert last is not None
    assert loop.fingerprint(run_url) == unbroken(reference, data_url, last, ranks)


@pytest.mark.timeout(900)
def test_a_killed_rank_and_a_killed_standby_cost_an_attempt_each_and_no_bit(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """And Ray's own workers go on: who watched the first rank watches the last one."""
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=2",
              "train.steps=1000000")  # fmt: skip
    try:
        job.wait_for_a_state(run_url)
        supervisors = {process.pid for process in cluster.workers(SUPERVISOR)}
        first = {process.pid for process in cluster.workers(RANK)}
        assert len(supervisors) == len(first) == 2
        for number, title in enumerate((RANK, STANDBY), 2):
            cluster.workers(title)[0].kill()
            job.wait_for_attempt(run_url, number)
        assert {process.pid for process in cluster.workers(SUPERVISOR)} == supervisors
        assert not first & {process.pid for process in cluster.workers(RANK)}
        text = stop(run_url, job)
    finally:
        ended(job)
    assert "its process was ended by SIGKILL" in text
    parts = re.findall(
        r"restarted in \d+\.\d\d s: start [\d.]+, group [\d.]+, engine [\d.]+, state [\d.]+, first batch [\d.]+, "
        r"first step [\d.]+",
        text,
    )
    assert len(parts) == 2, text[-6000:]
    check_bits(run_url, data_url, f"{bucket_url}/unbroken", 2)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 1])
def test_copies_in_memory_bound_the_steps_that_a_death_costs(
    ranks: int, cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """Killed anywhere, in the middle of a copy, and before and after its mark. What a lost supervisor held is lost."""
    every, run_url = 4, f"{bucket_url}/run"
    deaths = {"1": [ranks - 1, "half"], "2": [0, "whole"], "3": [ranks - 1, "committed"]}
    (tmp_path / "deaths.json").write_text(json.dumps(deaths))
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", f"cluster.workers={ranks}",
              "train.steps=1000000", "checkpoint.every_steps=1000000", f"checkpoint.memory_every_steps={every}",
              "cluster.max_failures=-1")  # fmt: skip
    try:
        for attempt, victim in ((0, RANK), (4, RANK), (5, SUPERVISOR)):
            job.wait_until(lambda attempt=attempt: len(done(tmp_path).get(attempt, ())) > every)
            if victim == SUPERVISOR:
                job.wait_until(lambda: latest_step(run_url) == min(done(tmp_path)[5]))
            cluster.workers(victim)[0].kill()
        job.wait_until(lambda: bool(done(tmp_path).get(6)))
        text = stop(run_url, job)
    finally:
        ended(job)
    steps = done(tmp_path)
    lost = [max(steps[attempt]) + 1 - min(steps[attempt + 1]) for attempt in range(5)]
    assert all(0 <= one <= every for one in lost), lost
    assert len(re.findall(r"the state was read in \d+\.\d s from memory", text)) == 5, text[-6000:]
    assert min(steps[6]) == min(steps[5]), "the newest in the store is what the attempt before had begun with"
    check_bits(run_url, data_url, f"{bucket_url}/unbroken", ranks)


def done(folder: Path) -> dict[int, set[int]]:
    """Attempt that made a step, from 0 -> the steps it made."""
    found: dict[int, set[int]] = {}
    for path in folder.glob("steps-*"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # a kill may have cut off the last one
                entry = json.loads(line)
                found.setdefault(entry["attempt"], set()).add(entry["step"])
    return found


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_lone_rank_that_stops_is_found_by_its_supervisor(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """SIGSTOP, and no other rank whose watchdog could notice."""
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=1",
              "train.steps=1000000", "cluster.hang_seconds=6")  # fmt: skip
    try:
        job.wait_for_a_state(run_url)
        (stopped,) = cluster.workers(RANK)
        stopped.suspend()
        job.wait_for_attempt(run_url, 2)
        assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
        text = stop(run_url, job)
    finally:
        ended(job)
    assert "no sign of life for 12 s" in text
    check_bits(run_url, data_url, f"{bucket_url}/unbroken", 1)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_rank_that_fails_more_often_than_allowed_ends_the_run_with_a_message(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=1",
              "train.steps=1000000", "cluster.max_failures=1")  # fmt: skip
    try:
        for number in (1, 2):
            job.wait_until(lambda number=number: attempts_of(run_url) >= number)
            job.wait_for_a_state(run_url)
            cluster.workers(RANK)[0].kill()
        assert job.process.wait(240) != 0
    finally:
        ended(job)
    text = job.log.read_text()
    assert "error: the training failed: its process was ended by SIGKILL" in text
    assert "given up after 2 failures, as cluster.max_failures says" in text
    assert attempts(run_url) == 2


def attempts_of(run_url: str) -> int:
    """0 before the first."""
    return attempts(run_url) if latest_step(run_url) is not None else 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kills_at_random_of_all_kinds_leave_the_bytes_as_they_were_and_nothing_behind(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """Twelve kills, also of processes that are just starting."""
    draw = random.Random(14)
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=2",
              "train.steps=1000000", "cluster.max_failures=-1")  # fmt: skip
    victims = [RANK] * 7 + [SUPERVISOR] * 2 + [STANDBY] * 3
    draw.shuffle(victims)
    try:
        job.wait_for_a_state(run_url)
        for number, title in enumerate(victims):
            job.wait_until(lambda title=title: bool(cluster.workers(title)))
            draw.choice(cluster.workers(title)).kill()
            if number % 3 == 2:
                job.wait_for_a_state(run_url)
            else:  # in the middle of a start, or of the first steps after it
                time.sleep(draw.uniform(0.1, 4.0))
        job.wait_for_a_state(run_url)
        stop(run_url, job)
    finally:
        ended(job)
    check_bits(run_url, data_url, f"{bucket_url}/unbroken", 2)
    deadline = time.monotonic() + 20
    while cluster.workers(RANK) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cluster.workers(RANK) == []
    assert len(cluster.workers(STANDBY)) == 1, "warm for the next job, and one alone"
