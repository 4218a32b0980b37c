"""A sampling job whose hosts lose their power or their network writes the bytes of a job on one machine."""

import time
from collections.abc import Iterator

import pytest

from ddpm_dist import storage
from ddpm_dist.cluster.pool import Done
from ddpm_dist.config import ClusterConfig
from ddpm_dist.sampling import job
from ddpm_dist.sampling.worker import SampleWorker
from tests.hosts.cluster import Job
from tests.hosts.conftest import BUCKET, Site
from tests.sampling.tiny import SETTINGS, contents, make_order, make_snapshot

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
SNAPSHOT = f"s3://{BUCKET}/snapshot"
SAMPLES = 480
STEPS = 20
"""So that a unit of 8 images takes long enough to be cut off in the middle of one."""
CUT_S = 20.0


class Here:
    """Stands in for the pool: one worker, in this process."""

    alive = 1

    def __init__(self) -> None:
        self._worker = SampleWorker(ClusterConfig())

    def map(self, tasks: Iterator[object]) -> Iterator[Done]:
        for task in tasks:
            yield Done(task, self._worker(task))


@pytest.fixture(scope="module")
def whole(site: Site) -> dict[str, str]:
    """What the job writes in one process."""
    make_snapshot(SNAPSHOT)
    settings = SETTINGS.model_copy(update={"steps": STEPS})
    order = make_order(SNAPSHOT, f"s3://{BUCKET}/whole", SAMPLES, sampling=settings)
    job.run([order], (1, 1), ClusterConfig(), Here())  # type: ignore[arg-type]
    return contents(order.out)


def start(site: Site, out: str) -> Job:
    words = {"BUCKET/runs/first": f"{BUCKET}/snapshot", "BUCKET/samples": f"{BUCKET}/{out}",
             "50000": str(SAMPLES), "1:16": "1:2", "gpus_per_worker=1": "gpus_per_worker=0"}  # fmt: skip
    return site.ray.submit(words, [f"sampling.steps={STEPS}"], "sample")


def receipts(out: str) -> int:
    return len(storage.list_objects(f"s3://{BUCKET}/{out}/receipts"))


def test_over_two_hosts(site: Site, whole: dict[str, str]) -> None:
    start(site, "samples-two").finish()
    assert contents(f"s3://{BUCKET}/samples-two") == whole


def test_a_host_loses_power(site: Site, whole: dict[str, str]) -> None:
    sampling, victim = start(site, "samples-dark"), site.workers[1]
    sampling.until(lambda: receipts("samples-dark") > 2)
    victim.power_cut()
    done = receipts("samples-dark")
    assert done < SAMPLES // 8, "the job was over before the cut; make it larger"
    try:
        sampling.finish()
    finally:
        victim.boot()
        site.ray.add(victim)
    assert contents(f"s3://{BUCKET}/samples-dark") == whole


def test_a_host_is_cut_off_for_a_while(site: Site, whole: dict[str, str]) -> None:
    """Behind the cut it goes on with its unit, and publishes it once more when it is back."""
    sampling, victim = start(site, "samples-cut"), site.workers[0]
    sampling.until(lambda: receipts("samples-cut") > 2)
    victim.cut()
    assert receipts("samples-cut") < SAMPLES // 8, "the job was over before the cut; make it larger"
    time.sleep(CUT_S)
    victim.heal()
    sampling.finish()
    assert contents(f"s3://{BUCKET}/samples-cut") == whole
