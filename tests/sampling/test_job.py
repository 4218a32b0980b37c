"""Sampling jobs on a real Ray cluster and a real S3 server: the same bytes however they are spread and broken."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.cluster.pool import ActorPool, Done
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data.index import load_index
from ddpm_dist.data.stream import iterate
from ddpm_dist.errors import ClusterError, ConfigError, DdpmDistError, NotFoundError, SamplingError, SnapshotError
from ddpm_dist.sampling import export_npz, export_png, job
from ddpm_dist.sampling.plan import Unit
from ddpm_dist.sampling.worker import SampleWorker
from tests.ray_local import ROOT, RayCluster
from tests.sampling.tiny import SETTINGS, CountingWorker, contents, make_order, make_snapshot
from tools.local.s3_server import S3Server

CLUSTER = ClusterConfig(wait_seconds=240)
UNIT = Unit(8, 16)


class InProcess:
    """Stands in for the pool: workers in this process, in turns."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = [SampleWorker(ClusterConfig()) for _ in range(workers)]
        self.alive = workers
        self.tasks: list[object] = []

    def map(self, tasks):  # type: ignore[no-untyped-def]
        for number, task in enumerate(tasks):
            self.tasks.append(task)
            yield Done(task, self.workers[number % self.alive](task))


def run_here(*orders: job.Order, workers: int = 2, verify: bool = False) -> list[job.Result]:
    return job.run(orders, (1, 2), CLUSTER, InProcess(workers), verify)  # type: ignore[arg-type]


def test_the_number_of_workers_shows_nowhere(ray_cluster: RayCluster, bucket_url: str) -> None:
    url = make_snapshot(f"{bucket_url}/snapshot", num_classes=3)
    for workers in (1, 2):
        run_here(make_order(url, f"{bucket_url}/{workers}", 44), workers=workers)
    result = job.run([make_order(url, f"{bucket_url}/3", 44)], (3, 3), CLUSTER)[0]
    assert (result.made, result.duplicates) == (44, 0)
    assert contents(f"{bucket_url}/1") == contents(f"{bucket_url}/2") == contents(f"{bucket_url}/3")
    samples = list(iterate(f"{bucket_url}/3"))
    assert [int(sample.key) for sample in samples] == list(range(44))
    assert {sample.label for sample in samples} == {0, 1, 2}
    assert {sample.image.shape for sample in samples} == {(1, 8, 8)}


def test_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    assert run_here(make_order(url, out))[0].made == 20
    whole = contents(out)
    assert run_here(make_order(url, out))[0].made == 0
    for unit, also_shard in ((Unit(0, 8), True), (Unit(16, 20), False)):
        storage.delete(storage.join(out, unit.receipt))
        if also_shard:
            storage.delete(storage.join(out, unit.shard))
    assert run_here(make_order(url, out))[0].made == 12
    assert contents(out) == whole


def _lose(url: str) -> None:
    storage.delete(url)


def _cut(url: str) -> None:
    storage.publish(url, storage.read(url)[:-512])


def _alter(url: str) -> None:
    data = bytearray(storage.read(url))
    data[min(520, len(data) // 2)] ^= 1  # of an image, or of the table
    storage.publish(url, bytes(data))


@pytest.mark.parametrize("name", [UNIT.shard, f"index/{UNIT.shard}.samples"])
@pytest.mark.parametrize("harm", [_lose, _cut, _alter])
def test_what_a_finished_folder_lost_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[str], None], name: str
) -> None:
    """A receipt outlives its shard: a listing tells what was lost or cut, reading tells what was altered."""
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    run_here(make_order(url, out))
    whole = contents(out)
    harm(storage.join(out, name))
    if harm is not _alter:
        assert run_here(make_order(url, out))[0].made == 8
    else:
        with pytest.raises(SamplingError, match="made again by the same command with --verify"):
            run_here(make_order(url, out))
        assert run_here(make_order(url, out), verify=True)[0].made == 8
    assert f"{name}: " in caplog.text
    assert contents(out) == whole
    assert run_here(make_order(url, out), verify=True)[0].made == 0


@pytest.mark.parametrize("spoilt", [b"", b"{}", b'["written"]', b'{"written": {"info": 3, "summary": {}}}'])
def test_a_damaged_receipt_is_said_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: bytes
) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    run_here(make_order(url, out))
    whole = contents(out)
    storage.publish(storage.join(out, UNIT.receipt), spoilt)
    assert run_here(make_order(url, out))[0].made == 8
    assert f"{UNIT.receipt}: not a receipt of a unit" in caplog.text
    storage.publish(storage.join(out, UNIT.receipt), storage.read(storage.join(out, Unit(0, 8).receipt)))
    assert run_here(make_order(url, out))[0].made == 8, "a receipt of another unit"
    assert contents(out) == whole


def test_a_job_may_grow(tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    run_here(make_order(url, f"file://{tmp_path}/once", 24))
    run_here(make_order(url, f"file://{tmp_path}/grown", 16))
    assert run_here(make_order(url, f"file://{tmp_path}/grown", 24))[0].made == 8
    assert contents(f"file://{tmp_path}/grown") == contents(f"file://{tmp_path}/once")


def start_driver(order: job.Order, cluster: RayCluster) -> "subprocess.Popen[bytes]":
    env = {**os.environ, **cluster.env, "RAY_ADDRESS": cluster.address}
    command = [
        sys.executable, "launch/sample.py", "--snapshot", order.snapshot, "--out", order.out,
        "--num-samples", str(order.num_samples), "--workers", "1:3",
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def receipts(out: str) -> int:
    return len(storage.list_objects(storage.join(out, "receipts")))


def test_kills_of_workers_driver_and_node_change_nothing(ray_cluster: RayCluster, bucket_url: str) -> None:
    """SIGKILL at random: of workers while the job runs, of the driver, of a whole node; then it is let finish."""
    url = make_snapshot(f"{bucket_url}/snapshot")
    run_here(make_order(url, f"{bucket_url}/whole", 400))
    order = make_order(url, f"{bucket_url}/killed", 400)
    chance = random.Random(4)
    node = ray_cluster.add_node(2)
    driver = start_driver(order, ray_cluster)
    try:
        _until(lambda: receipts(order.out) > 3, driver)
        for _ in range(2):
            workers = ray_cluster.workers()
            if workers:
                chance.choice(workers).send_signal(signal.SIGKILL)
            time.sleep(chance.uniform(0.1, 0.5))
        driver.kill()
        driver.wait()
        left = receipts(order.out)
        assert left < 50, "the job was over before it could be killed; make it larger"
        driver = start_driver(order, ray_cluster)
        _until(lambda: receipts(order.out) > left, driver)
        ray_cluster.kill_node(node)
        assert driver.wait(180) == 0
    finally:
        driver.kill()
        ray_cluster.kill_node(node)
    assert contents(order.out) == contents(f"{bucket_url}/whole")


def test_an_outage_of_the_store_is_waited_out(
    ray_cluster: RayCluster, s3_server: S3Server, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_snapshot(f"{bucket_url}/snapshot")
    run_here(make_order(url, f"{bucket_url}/whole", 160))
    order = make_order(url, f"{bucket_url}/cut", 160)
    driver = start_driver(order, ray_cluster)
    try:
        _until(lambda: receipts(order.out) > 2, driver)
        s3_server.kill()
        time.sleep(2)
        s3_server.restart()
        assert driver.wait(180) == 0
    finally:
        driver.kill()
    assert contents(order.out) == contents(f"{bucket_url}/whole")


def _until(true, driver: "subprocess.Popen[bytes]", patience_s: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + patience_s
    while not true():
        assert driver.poll() is None, "the job ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sweep_loads_each_snapshot_once_a_worker(tmp_path: Path) -> None:
    urls = [make_snapshot(f"file://{tmp_path}/snapshot{seed}", seed=seed) for seed in (0, 1)]
    orders = [
        make_order(
            url, f"file://{tmp_path}/{number}-{steps}", 512, sampling=SETTINGS.model_copy(update={"steps": steps})
        )
        for number, url in enumerate(urls)
        for steps in (1, 2, 3)
    ]
    orders = [
        job.Order(o.snapshot, o.out, 512, sampling=o.sampling.model_copy(update={"unit_size": 128, "batch_size": 64}))
        for o in orders
    ]
    pool = InProcess()
    results = job.run(orders, (1, 2), CLUSTER, pool)  # type: ignore[arg-type]
    assert [worker.loads for worker in pool.workers] == [2, 2]
    assert [result.made for result in results] == [512] * 6
    grids = {storage.read(result.grid) for result in results}
    assert len(grids) == 6


@pytest.mark.full
def test_two_workers_of_a_cluster_load_each_snapshot_of_a_sweep_once(ray_cluster: RayCluster, bucket_url: str) -> None:
    urls = [make_snapshot(f"{bucket_url}/snapshot{seed}", seed=seed) for seed in (0, 1)]
    settings = SETTINGS.model_copy(update={"unit_size": 64, "batch_size": 64})
    orders = [
        job.Order(url, f"{bucket_url}/{number}-{steps}", 512, sampling=settings.model_copy(update={"steps": steps}))
        for number, url in enumerate(urls)
        for steps in (1, 2, 3)
    ]
    with ActorPool(partial(CountingWorker, f"{bucket_url}/loads"), (2, 2), CLUSTER) as pool:
        results = job.run(orders, (2, 2), CLUSTER, pool)
    assert [result.made for result in results] == [512] * 6
    loads = [json.loads(storage.read(f"{bucket_url}/loads/{pid}")) for pid in storage.list_names(f"{bucket_url}/loads")]
    assert len(loads) == 2
    assert all(told["loads"] == len(told["snapshots"]) for told in loads)
    assert any(len(told["snapshots"]) == 2 for told in loads)


def test_equal_seeds_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes duplicates elsewhere, a seed per worker that is the same everywhere, is seen in the result."""
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    assert run_here(make_order(url, f"file://{tmp_path}/distinct", 20))[0].duplicates == 0
    monkeypatch.setattr(
        Unit, "batches", lambda unit, size: Unit(0, unit.stop - unit.start)._batches(size), raising=False
    )
    monkeypatch.setattr(Unit, "_batches", lambda unit, size: _batches(unit, size), raising=False)
    assert run_here(make_order(url, f"file://{tmp_path}/equal", 20))[0].duplicates == 12


def _batches(unit: Unit, size: int) -> list[object]:
    return [torch.arange(first, first + size) for first in range(unit.start, unit.stop, size)]


def test_a_class_conditional_network_of_diffusers(tmp_path: Path) -> None:
    """It has no null class: classes are drawn or given, and it can't be guided."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        num_class_embeds=3,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(20)).save_pretrained(tmp_path / "theirs")
    url, out = f"file://{tmp_path}/theirs", f"file://{tmp_path}/out"
    run_here(make_order(url, out), make_order(url, f"{out}-1", labels="1"))
    assert {sample.label for sample in iterate(out)} == {0, 1, 2}
    assert {sample.label for sample in iterate(f"{out}-1")} == {1}
    assert load_index(out).num_samples == 20
    guided = make_order(url, f"{out}-2", sampling=SETTINGS.model_copy(update={"guidance_scale": 2.0}))
    with pytest.raises(SamplingError, match="network has no null class, it can't be guided by classes; use 1"):
        run_here(guided)


def test_exports(tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=2), f"file://{tmp_path}/out"
    run_here(make_order(url, out))
    export_npz(out, f"file://{tmp_path}/all.npz")
    export_png(out, f"file://{tmp_path}/png")
    samples = list(iterate(out))
    with np.load(io.BytesIO(storage.read(f"file://{tmp_path}/all.npz"))) as arrays:
        assert np.array_equal(arrays["arr_0"], np.stack([s.image.transpose(1, 2, 0) for s in samples]))
        assert arrays["arr_1"].tolist() == [s.label for s in samples]
    names = sorted(str(path.relative_to(tmp_path / "png")) for path in (tmp_path / "png").rglob("*.png"))
    assert names == sorted(f"{s.label}/{s.key}.png" for s in samples)


def test_the_samples_are_a_data_set(tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    raw = SETTINGS.model_copy(update={"format": "raw"})
    run_here(make_order(url, out), make_order(url, f"{out}-raw", sampling=raw))
    index = load_index(out)
    assert (index.num_samples, index.schema.min_size, index.num_classes) == (20, (8, 8), None)
    for png, npy in zip(iterate(out), iterate(f"{out}-raw"), strict=True):
        assert np.array_equal(png.image, npy.image)


def test_bad_orders_say_what_is_wrong(tmp_path: Path) -> None:
    place = f"file://{tmp_path}"
    url = make_snapshot(f"{place}/snapshot")
    run_here(make_order(url, f"{place}/taken"))
    storage.publish(f"{place}/foreign/notes.txt", b"mine")
    guided, too_many = SETTINGS.model_copy(update={"guidance_scale": 3.0}), SETTINGS.model_copy(update={"steps": 99})
    cases: list[tuple[job.Order, type[DdpmDistError], str]] = [
        (make_order(f"{place}/nothing", f"{place}/o"), SnapshotError, "not a snapshot, it has no model_index.json"),
        (make_order(url, f"{place}/o", labels="3"), SamplingError, "network is unconditional; leave --labels out"),
        (make_order(url, f"{place}/o", sampling=guided), SamplingError, "can't be guided by classes; use 1"),
        (make_order(url, f"{place}/o", sampling=too_many), ConfigError, "sampling.steps: 99"),
        (make_order(url, f"{place}/o", 0), SamplingError, "--num-samples 0: at least 1"),
        (make_order(url, f"{place}/taken", seed=5), SamplingError, "another job's samples:\n  seed: 0 -> 5"),
        (make_order(url, f"{place}/foreign"), SamplingError, "holds objects, but no manifest.json"),
        (make_order(url, f"{place}/taken", 40), SamplingError, "whose last unit is shorter"),
    ]
    before = contents(f"{place}/taken")
    for order, kind, message in cases:
        with pytest.raises(kind) as error:
            job.run([order], (1, 2), CLUSTER, _Probing())  # type: ignore[arg-type]
        assert message in str(error.value)
    assert storage.list_names(f"{place}/o") == []
    assert contents(f"{place}/taken") == before


class _Probing(InProcess):
    """As the pool: errors of ours come back as failures."""

    def map(self, tasks):  # type: ignore[no-untyped-def]
        from ddpm_dist.cluster.pool import Failed

        for task in tasks:
            try:
                yield Done(task, self.workers[0](task))
            except DdpmDistError as error:
                yield Failed(task, error)


def test_no_bucket_is_found_before_any_worker_starts(bucket_url: str) -> None:
    url = make_snapshot(f"{bucket_url}/snapshot")
    with pytest.raises(NotFoundError, match="there is no bucket nowhere-at-all"):
        job.run([make_order(url, "s3://nowhere-at-all/out")], (1, 1), CLUSTER)


def test_units_that_fail_are_named_and_the_rest_is_there(tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"

    class Spoilt(InProcess):
        def map(self, tasks):  # type: ignore[no-untyped-def]
            from ddpm_dist.cluster.pool import Failed

            for task in tasks:
                if getattr(task, "unit", None) == Unit(8, 16):
                    yield Failed(task, ClusterError("KeyError: 'x'"))
                else:
                    yield Done(task, self.workers[0](task))

    with pytest.raises(SamplingError, match=r"1 of 3 units failed.*\n  images 8\.\.15 of file.*KeyError"):
        job.run([make_order(url, out)], (1, 2), CLUSTER, Spoilt())  # type: ignore[arg-type]
    assert receipts(out) == 2
    with pytest.raises(NotFoundError):
        load_index(out)
    run_here(make_order(url, out))
    assert load_index(out).num_samples == 20
    assert snapshot.snapshot_id(url)
