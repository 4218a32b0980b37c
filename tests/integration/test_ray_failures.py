"""Ray jobs whose ranks hang, whose loader processes die and whose nodes go and come: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_dist import storage
from ddpm_dist.state import history
from ddpm_dist.state.history import latest_step
from tests.integration import jobs, loop_ranks as loop
from tests.ray_local import RayCluster
from tools.local.processes import start_bound
from tools.local.s3_server import S3Server

EVERY = "checkpoint.every_steps=5"


@pytest.fixture
def cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """A head with one CPU; tests add nodes."""
    running = RayCluster(1, s3_server.env)
    yield running
    running.close()


class Job:
    """tests/integration/recorded_job.py as a driver on the cluster."""

    def __init__(self, cluster: RayCluster, folder: Path, *overrides: str) -> None:
        self.folder, self.log = folder, folder / "driver.log"
        command = [sys.executable, "-m", "tests.integration.recorded_job", folder, *loop.TINY, EVERY, *overrides]
        environment = {**os.environ, **cluster.env, "RAY_ADDRESS": cluster.address}
        with self.log.open("w") as out:
            self.process: subprocess.Popen[str] = start_bound(
                [str(part) for part in command], cwd=loop.ROOT, env=environment, stdout=out, stderr=out, text=True
            )

    def wait_until(self, true: Callable[[], bool], patience_s: float = 240) -> None:
        jobs.wait_until(true, self.process, self.log, patience_s)

    def wait_for_attempt(self, run_url: str, attempt: int) -> None:
        """Until it has claimed the run, and published a state."""
        self.wait_until(lambda: attempts(run_url) >= attempt)
        self.wait_for_a_state(run_url)

    def wait_for_a_state(self, run_url: str) -> None:
        """Until a newer one than there is now is published."""
        reached = latest_step(run_url) or 0
        self.wait_until(lambda: (latest_step(run_url) or 0) > reached)

    def finish(self) -> str:
        jobs.finish(self.process, self.log, 400)
        text = self.log.read_text()
        assert "PlacementGroupCleaner" not in text, "which asks a dashboard, and there is none"
        return text

    def last_world(self) -> int:
        """Ranks of the newest step that was recorded."""
        steps = loop.steps_of(self.folder)
        return int(steps[max(steps)]["world"]) if steps else 0


def attempts(run_url: str) -> int:
    return max(history.read(f"{run_url}/checkpoints")[0])


def ended(job: Job) -> None:
    if job.process.poll() is None:
        job.process.kill()
    job.process.wait()


def unbroken(run_url: str, data_url: str, steps: int, ranks: int) -> str:
    return loop.finish(loop.config(run_url, data_url, EVERY, f"train.steps={steps}"), ranks)


@pytest.mark.timeout(900)
def test_a_rank_that_stops_is_found_by_the_others_and_the_run_begins_again(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """SIGSTOP: the process is there, and silent. Its peer's watchdog ends the attempt and shows all threads."""
    cluster.add_node(1)
    run_url = f"{bucket_url}/run"
    # The limit of a later step; the floor of the first is five times as long.
    plan = (f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=2", "cluster.hang_seconds=8")
    job = Job(cluster, tmp_path, *plan, "train.steps=1000000")
    try:
        job.wait_until(lambda: (latest_step(run_url) or 0) >= 5)
        stopped = cluster.workers("ddpm_dist rank")[0]
        stopped.suspend()
        assert attempts(run_url) == 1
        job.wait_for_attempt(run_url, 2)
        assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, "Ray has ended what hung"
        storage.publish(f"{run_url}/stop", b"")
        text = job.finish()
    finally:
        ended(job)
    assert "no step for" in text
    assert "ending this attempt" in text
    assert text.count("Thread 0x") > 3, "all threads"
    assert "in step" in text or "in _one_step" in text or "in wait" in text, "the place where it waited"
    last = latest_step(run_url)
    assert last is not None
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, last, 2)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_loader_process_that_dies_costs_an_attempt_and_nothing_else(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "data.workers=1", "train.steps=1000000",
              "cluster.workers=1")  # fmt: skip
    try:
        job.wait_until(lambda: (latest_step(run_url) or 0) >= 5)
        (worker,) = cluster.workers("ddpm_dist rank")
        (loader,) = [p for p in worker.children() if any("spawn_main" in part for part in p.cmdline())]
        loader.send_signal(signal.SIGKILL)
        job.wait_for_attempt(run_url, 2)
        storage.publish(f"{run_url}/stop", b"")
        text = job.finish()
    finally:
        ended(job)
    assert "a loader process ended with exit code -9" in text
    last = latest_step(run_url)
    assert last is not None
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, last, 1)


@pytest.mark.timeout(900)
def test_a_node_that_is_announced_to_go_away_is_left_without_loss(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """Ray's preemption notice: both ranks save and leave; the run goes on from there on the node that stays."""
    node = cluster.add_node(1)
    run_url = f"{bucket_url}/run"
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", "train.steps=1000000",
              "checkpoint.every_steps=1000000", "cluster.workers=[1,2]", "cluster.max_failures=0")  # fmt: skip
    try:
        job.wait_until(lambda: job.last_world() == 2 and len(loop.steps_of(tmp_path)) > 3)
        cluster.announce_loss(seconds=200)
        job.wait_until(lambda: latest_step(run_url) is not None, 180)
        saved = latest_step(run_url) or 0
        job.wait_until(lambda: job.last_world() == 1)
        cluster.kill_node(node)
        reached = max(loop.steps_of(tmp_path))
        job.wait_until(lambda: max(loop.steps_of(tmp_path)) > reached)
        storage.publish(f"{run_url}/stop", b"")
        text = job.finish()
    finally:
        ended(job)
    assert f"the state of step {saved} is saved" in text
    assert f"continuing at step {saved} " in text
    done = [json.loads(line) for path in tmp_path.glob("steps-*") for line in path.read_text().splitlines()]
    assert max(entry["step"] for entry in done if entry["attempt"] == 0) == saved - 1, "no step was made in vain"
    assert min(entry["step"] for entry in done if entry["attempt"] == 1) == saved


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_an_elastic_run_takes_admissible_sizes_and_the_same_batches(
    cluster: RayCluster, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """Room for 3 workers, then 1, then 4, where 16 images can be shared by 2, 1 and 4; and a worker that is killed."""
    node = cluster.add_node(2)
    run_url = f"{bucket_url}/run"
    plan = ("precision=fp32", "model.dropout=0")
    job = Job(cluster, tmp_path, f"run.url={run_url}", f"data.url={data_url}", *plan, "train.steps=1000000",
              "cluster.workers=[1,4]")  # fmt: skip
    worlds = []
    try:
        job.wait_until(lambda: (latest_step(run_url) or 0) >= 5)
        worlds.append(job.last_world())
        before = attempts(run_url)
        cluster.workers("ddpm_dist rank")[0].kill()
        job.wait_for_attempt(run_url, before + 1)
        for change, size in ((lambda: cluster.kill_node(node), 1), (lambda: cluster.add_node(3), 4)):
            change()
            job.wait_until(lambda size=size: job.last_world() == size, 400)
            job.wait_for_a_state(run_url)
            worlds.append(job.last_world())
        storage.publish(f"{run_url}/stop", b"")
        job.finish()
    finally:
        ended(job)
    assert worlds == [2, 1, 4]
    steps = loop.steps_of(tmp_path)
    last = latest_step(run_url)
    assert last is not None
    assert sorted(steps) == list(range(last))
    steady = tmp_path / "steady"
    steady.mkdir()
    cfg = loop.config(f"{bucket_url}/steady", data_url, EVERY, *plan, f"train.steps={last}")
    loop.finish(cfg, 2, loop.Faults(record=str(steady)))
    expected = loop.steps_of(steady)
    for step in range(last):
        assert steps[step]["keys"] == expected[step]["keys"], step
    assert {entry["world"] for entry in steps.values()} == {1, 2, 4}
    difference = max(abs(steps[s]["loss"] - expected[s]["loss"]) for s in range(min(last, 100)))
    assert difference < 1e-4, "by no more than the order of sums"
