"""`ray job submit … launch/train.py` on a real cluster: workers and drivers killed, mistakes answered."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_dist import storage
from ddpm_dist.errors import ClusterError
from ddpm_dist.state.history import latest_step
from tests.cluster.test_ports import told_without_a_token
from tests.integration import jobs
from tools.local.ray_cluster import RayCluster
from tools.local.s3_server import S3Server, client_environment

STEPS = 24


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    with RayCluster(4, client_environment(s3_server)) as running:
        yield running


class Job:
    """A submitted training job; its output collects in `lines`."""

    def __init__(self, cluster: RayCluster, *overrides: str) -> None:
        self.lines: list[str] = []
        self.failed = False
        command = ["python", "launch/train.py", "--config", "configs/digits.yaml", *jobs.SMALL, *overrides]
        self._thread = threading.Thread(target=self._run, args=(cluster, command))
        self._thread.start()

    def _run(self, cluster: RayCluster, command: list[str]) -> None:
        try:
            cluster.submit(command, self.lines.append)
        except ClusterError:
            self.failed = True

    def wait(self) -> str:
        self._thread.join(400)
        assert not self._thread.is_alive(), self.text[-4000:]
        return self.text

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def kill(cluster: RayCluster, is_it: Callable[[list[str]], bool]) -> None:
    """SIGKILL to one process of the cluster, known by its command line."""
    for process in cluster.processes():
        with contextlib.suppress(psutil.Error):
            if is_it(process.cmdline()):
                process.kill()
                return
    raise AssertionError("there is no such process")


def is_rank(command: list[str]) -> bool:
    return bool(command) and command[0].startswith("ddpm_dist rank")


def is_driver(command: list[str]) -> bool:
    return len(command) > 1 and Path(command[0]).name.startswith("python") and command[1] == "launch/train.py"


def wait_for_state(run_url: str, step: int, job: Job) -> None:
    for _ in range(2400):
        if (latest_step(run_url) or 0) >= step:
            return
        assert job._thread.is_alive(), job.text[-4000:]
        threading.Event().wait(0.05)
    raise AssertionError(job.text[-4000:])


@pytest.mark.timeout(900)
def test_killed_worker_and_killed_driver_leave_no_trace_in_the_weights(cluster: RayCluster, bucket_url: str) -> None:
    data_url = f"{bucket_url}/data"
    jobs.make_digits(data_url)
    common = [f"data.url={data_url}", f"train.steps={STEPS}", "cluster.workers=2"]
    unbroken, broken = f"{bucket_url}/unbroken", f"{bucket_url}/broken"
    text = Job(cluster, f"run.url={unbroken}", *common).wait()
    assert f"finished at step {STEPS}" in text, text[-4000:]

    job = Job(cluster, f"run.url={broken}", *common)
    wait_for_state(broken, 4, job)
    kill(cluster, is_rank)  # its supervisor starts another one, within the same job
    wait_for_state(broken, 12, job)
    kill(cluster, is_driver)  # the driver; nobody starts it again
    job.wait()
    text = Job(cluster, f"run.url={broken}", *common).wait()
    assert f"finished at step {STEPS}" in text, text[-4000:]
    assert "continuing at step" in text
    assert jobs.weights_sha256(broken, STEPS) == jobs.weights_sha256(unbroken, STEPS)
    assert told_without_a_token(cluster.processes()) == []
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in text
    assert all(secret.encode() not in storage.read(f"{broken}/{name}") for name in ("config.yaml", "summary.json"))


def test_too_few_cpus_is_one_clear_message(cluster: RayCluster, tmp_path: Path) -> None:
    data_url = (tmp_path / "data").as_uri()
    jobs.make_digits(data_url)
    job = Job(
        cluster, f"run.url={(tmp_path / 'run').as_uri()}", f"data.url={data_url}", "cluster.workers=16",
        "cluster.wait_seconds=1",
    )  # fmt: skip
    text = job.wait()
    assert job.failed
    assert "error: 16 workers need 16 CPU; the cluster has 4 CPU" in text
    assert "Traceback" not in text


def test_an_error_of_ours_in_a_worker_stops_the_run_at_once(cluster: RayCluster, tmp_path: Path) -> None:
    """A gradient that isn't finite at every step: Ray would start the workers ten times."""
    data_url = (tmp_path / "data").as_uri()
    jobs.make_digits(data_url)
    job = Job(
        cluster, f"run.url={(tmp_path / 'run').as_uri()}", f"data.url={data_url}", "cluster.workers=1",
        "train.steps=500", "train.lr=1e30", "precision=fp32", "train.warmup_steps=0", "train.max_nonfinite_steps=3",
    )  # fmt: skip
    text = job.wait()
    assert job.failed
    assert "error: 3 steps in a row" in text, text[-3000:]
    assert text.count("a new run begins") == 1
    assert list((tmp_path / "run" / "failures").glob("step-*-rank-00000.json"))


def test_a_large_working_directory_is_said(cluster: RayCluster, tmp_path: Path) -> None:
    for name in ("set", "photos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.tar").write_bytes(bytes(40_000_000))
    (tmp_path / ".rayignore").write_text("/photos\n")
    (tmp_path / "job.py").write_text("from ddpm_dist.cluster import connect_ray\nconnect_ray()\n")
    lines: list[str] = []
    cluster.submit(["python", "job.py"], lines.append, tmp_path)
    (said,) = [line for line in lines if "the working directory of this job is 40 MB" in line]
    assert "set/shard.tar (40 MB)" in said
    assert "photos" not in said
