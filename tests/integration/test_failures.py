"""Jobs under DeepSpeed's launcher whose processes, disk, store and rivals fail: the bytes at the end are the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_dist import storage
from ddpm_dist.state import history
from ddpm_dist.state.history import latest_step
from tests.integration import jobs, loop_ranks as loop
from tests.integration.loop_ranks import Faults
from tools.local.processes import start_bound
from tools.local.s3_server import S3Server

ENDLESS = "train.steps=1000000"
EVERY = "checkpoint.every_steps=4"


class Job:
    """A job of two ranks; all of it dies with the test."""

    def __init__(self, log: Path, *overrides: str) -> None:
        self.log = log
        self.process = jobs.deepspeed("configs/digits.yaml", [*loop.TINY, EVERY, "cluster.workers=2", *overrides], log)

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in the order of ranks."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if any(part.endswith("train_deepspeed.py") for part in command[:3]) and "RANK" in environment:
                found[int(environment["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def wait_for_state(self, run_url: str, step: int) -> None:
        jobs.wait_until(jobs.state_reached(run_url, step), self.process, self.log)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    @property
    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    started: list[Job] = []

    def begin(*overrides: str) -> Job:
        started.append(Job(tmp_path / f"log-{len(started)}", *overrides))
        return started[-1]

    yield begin
    for job in started:
        try:
            job.signal(signal.SIGKILL)
        except ProcessLookupError:
            pass
        job.process.wait()


def unbroken(run_url: str, data_url: str, steps: int) -> str:
    """The state after so many steps of a run that nothing happened to."""
    return loop.finish(loop.config(run_url, data_url, EVERY, f"train.steps={steps}"), 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
@pytest.mark.parametrize("loader_processes", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_signal_in_mid_step_saves_and_leaves(
    start, loader_processes: int, number: signal.Signals, data_url: str, bucket_url: str
) -> None:
    """To every process of the job, loader processes included, as a batch system or a terminal sends it."""
    run_url = f"{bucket_url}/run"
    job = start(f"run.url={run_url}", f"data.url={data_url}", ENDLESS, f"data.workers={loader_processes}")
    job.wait_for_state(run_url, 4)
    ranks = job.ranks()
    assert len(ranks) == 2
    told = time.monotonic()
    job.signal(number)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, job.text
    assert time.monotonic() - told < 60
    assert "as asked; the same command continues" in job.text, job.text
    if number is signal.SIGTERM:  # on Ctrl-C DeepSpeed's runner shows one of its own
        assert "Traceback" not in job.text, job.text
    assert "ddpm_dist/" not in job.text, "none of ours"
    stopped = latest_step(run_url)
    assert f"stopped at step {stopped}, as asked" in job.text, "the last state is of the step at which it left"
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, stopped)


def test_ctrl_c_saves_and_leaves(data_url: str, tmp_path: Path) -> None:
    """In a terminal, one process: no step is lost."""
    run_url, log = f"{tmp_path.as_uri()}/run", tmp_path / "log"
    plan = [*loop.TINY, ENDLESS, "checkpoint.every_steps=1000000", f"run.url={run_url}", f"data.url={data_url}"]
    command = [sys.executable, "launch/train_deepspeed.py", "--config", "configs/digits.yaml", *plan]
    with log.open("w") as out:
        job = start_bound(command, cwd=loop.ROOT, stdout=out, stderr=out)
    try:
        jobs.wait_until(lambda: "step 10/" in log.read_text(), job, log, 120)
        job.send_signal(signal.SIGINT)
        assert job.wait(60) == 0, log.read_text()
    finally:
        job.kill()
    assert "Ctrl-C once more leaves without it" in log.read_text()
    assert f"stopped at step {latest_step(run_url)}, as asked; the same command continues" in log.read_text()


@pytest.mark.timeout(600)
def test_a_second_job_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    start, data_url: str, bucket_url: str
) -> None:
    run_url = f"{bucket_url}/run"
    same = (f"run.url={run_url}", f"data.url={data_url}", ENDLESS)
    first = start(*same)
    first.wait_for_state(run_url, 4)
    second = start(*same)
    assert second.process.wait(120) != 0
    assert f"error: run.url: {run_url} is in use by process" in second.text
    assert "Traceback" not in second.text
    assert first.process.poll() is None
    first.wait_for_state(run_url, (latest_step(run_url) or 0) + 8)
    first.signal(signal.SIGKILL)
    first.process.wait()
    reached = latest_step(run_url)
    assert reached is not None
    third = start(*same[:2], f"train.steps={reached + 8}")
    jobs.finish(third.process, third.log)
    assert f"continuing at step {reached} " in third.text
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, reached + 8)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_an_attempt_that_comes_back_from_the_dead_spoils_nothing(start, data_url: str, bucket_url: str) -> None:
    """All processes of a job stop, as behind a network cut; another job takes over; then they go on."""
    run_url = f"{bucket_url}/run"
    same = (f"run.url={run_url}", f"data.url={data_url}", ENDLESS)
    zombie = start(*same)
    zombie.wait_for_state(run_url, 8)
    everything = [psutil.Process(zombie.process.pid), *psutil.Process(zombie.process.pid).children(recursive=True)]
    for process in everything:
        process.suspend()
    at = latest_step(run_url) or 0
    heir = start(*same)
    heir.wait_for_state(run_url, at + 8)
    assert "gave no sign of life; its lease is taken over" in heir.text
    for process in everything:
        process.resume()
    assert zombie.process.wait(120) != 0, "the zombie ends"
    assert "attempt 2 has taken this run over from attempt 1, which ends here" in zombie.text, zombie.text
    heir.wait_for_state(run_url, (latest_step(run_url) or 0) + 12)
    ranks = heir.ranks()
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    jobs.finish(heir.process, heir.log)
    stopped = latest_step(run_url)
    assert stopped is not None
    claims, states = history.read(f"{run_url}/checkpoints")
    assert max(claims) == 2
    assert states[0].attempt == 2
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, stopped)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_twenty_seconds_without_a_store_in_the_middle_of_a_save_cost_no_attempt(
    start, s3_server: S3Server, bucket_url: str
) -> None:
    """The server is killed as soon as a save has begun; data and states come from it and go to it."""
    run_url, data_url, steps = f"{bucket_url}/run", f"{bucket_url}/data", 60
    jobs.make_digits(data_url)
    job = start(f"run.url={run_url}", f"data.url={data_url}", f"train.steps={steps}")
    checkpoints = f"{run_url}/checkpoints"

    def in_a_save() -> bool:
        states = {name.split("/")[0] for name in storage.list_objects(checkpoints) if name.startswith("0000000")}
        whole = {str(state) for state in history.read(checkpoints)[1]}
        return bool(whole) and bool(states - whole)

    jobs.wait_until(in_a_save, job.process, job.log)
    s3_server.kill()
    time.sleep(20)
    assert job.process.poll() is None, job.text
    s3_server.restart()
    jobs.finish(job.process, job.log)
    assert "Traceback" not in job.text, job.text
    assert max(history.read(checkpoints)[0]) == 1, "one attempt did it all"
    assert loop.fingerprint(run_url) == unbroken(f"{bucket_url}/unbroken", data_url, steps)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_the_run_with_its_name_and_loses_no_state(
    small_disk: Path, tmp_path: Path, data_url: str
) -> None:
    """States of 16 MB: there is room for two, and a third has to be written before the first is removed."""
    plan = (EVERY, "train.steps=16", "model.channels=32", "model.norm_groups=32", "model.num_res_blocks=2")
    run_url = (small_disk / "run").as_uri()
    cfg = loop.config(run_url, data_url, *plan)
    results = loop.attempt(cfg, 2, Faults(record=str(tmp_path)))
    said = "\n".join(result for result in results if isinstance(result, str))
    assert "ddpm_dist.errors.StorageError" in said, results
    assert "No space left on device" in said
    _, states = history.read(f"{run_url}/checkpoints")
    assert [state.step for state in states] == [8, 4], "what was acknowledged is there"
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    end = loop.finish(cfg, 2, Faults(record=str(tmp_path)))
    assert "continuing at step 8" in (tmp_path / "log-0").read_text()
    assert end == loop.finish(loop.config((tmp_path / "unbroken").as_uri(), data_url, *plan), 2)
