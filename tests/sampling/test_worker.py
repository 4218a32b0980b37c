"""A worker's bytes: a function of the manifest and the unit, by independent calls of the sampler."""

from pathlib import Path

import pytest
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.data import writer
from ddpm_dist.data.index import ShardInfo
from ddpm_dist.diffusion.denoiser import Guide
from ddpm_dist.diffusion.samplers import sample
from ddpm_dist.errors import ConfigError, SamplingError, WorkerRefusedError
from ddpm_dist.sampling.folder import Receipt
from ddpm_dist.sampling.plan import Fingerprint, Manifest, Unit
from ddpm_dist.sampling.worker import Probe, ProbeTask, SampleWorker, UnitTask
from tests.sampling.test_plan import manifest as any_manifest
from tests.sampling.tiny import SETTINGS, contents, make_snapshot


def manifest_for(url: str, worker: SampleWorker, **changes: object) -> Manifest:
    info = snapshot.load_info(url)
    values = {
        "snapshot": url,
        "snapshot_id": snapshot.snapshot_id(url),
        "num_classes": info["null_label"],
        "labels": "none" if info["null_label"] is None else "random",
        "num_samples": 20,
        "sampling": SETTINGS,
        "fingerprint": worker.fingerprint(),
    }
    return any_manifest(**{**values, **changes})


@pytest.fixture
def worker() -> SampleWorker:
    return SampleWorker(ClusterConfig())


def test_images_are_those_of_the_sampler(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    images, labels = worker.images(manifest_for(url, worker, seed=7), Unit(8, 14))
    network, diffusion = snapshot.load_snapshot(url)
    parts = [
        sample(network, diffusion, SETTINGS, seed=7, indices=torch.arange(i, i + 4), shape=(1, 8, 8)) for i in (8, 12)
    ]
    expected = ((torch.cat(parts)[:6] + 1) * 127.5).round().to(torch.uint8)
    assert labels is None
    assert torch.equal(images, expected)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_images_of_a_continuous_process(process: str, worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", process=process)
    settings = SamplingConfig(sampler="heun", steps=3, spacing="rho", batch_size=4, unit_size=8)
    images, _ = worker.images(manifest_for(url, worker, seed=7, sampling=settings), Unit(8, 12))
    network, diffusion = snapshot.load_snapshot(url)
    expected = sample(network, diffusion, settings, seed=7, indices=torch.arange(8, 12), shape=(1, 8, 8))
    assert torch.equal(images, ((expected + 1) * 127.5).round().to(torch.uint8))


def test_a_guide_is_read_and_leads(worker: SampleWorker, tmp_path: Path) -> None:
    """Autoguidance by another snapshot; one of another process is refused before any image is made."""
    url, worse = make_snapshot(f"file://{tmp_path}/snapshot"), make_snapshot(f"file://{tmp_path}/worse", seed=1)
    settings = SETTINGS.model_copy(update={"guide": worse, "guidance_scale": 2.0})
    images, _ = worker.images(manifest_for(url, worker, sampling=settings), Unit(0, 4))
    (network, diffusion), (other, theirs) = snapshot.load_snapshot(url), snapshot.load_snapshot(worse)
    expected = sample(
        network, diffusion, settings, seed=0, indices=torch.arange(4), shape=(1, 8, 8), guide=Guide(other, theirs, None)
    )
    assert torch.equal(images, ((expected + 1) * 127.5).round().to(torch.uint8))
    plain, _ = worker.images(manifest_for(url, worker), Unit(0, 4))
    assert not torch.equal(images, plain)
    assert worker.loads == 2

    edm = make_snapshot(f"file://{tmp_path}/edm", process="edm")
    wrong = settings.model_copy(update={"guide": edm})
    with pytest.raises(SamplingError, match="its process has other noise levels"):
        worker(ProbeTask(url, wrong.model_dump_json(), 8))


def test_a_unit_twice_writes_the_same_bytes(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=3)
    text = manifest_for(url, worker).model_dump_json()
    again = SampleWorker(ClusterConfig())
    for out, who in (("a", worker), ("b", again)):
        for unit in [Unit(0, 8), Unit(16, 20), Unit(8, 16)][:: 1 if out == "a" else -1]:
            who(UnitTask(f"file://{tmp_path}/{out}", text, unit))
    assert contents(f"file://{tmp_path}/a") == contents(f"file://{tmp_path}/b")
    assert len(contents(f"file://{tmp_path}/a")) == 9


def test_labels_stand_in_the_shard(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=3)
    manifest = manifest_for(url, worker, labels="2,0")
    worker(UnitTask(f"file://{tmp_path}/out", manifest.model_dump_json(), Unit(8, 11)))
    data = storage.read(f"file://{tmp_path}/out/{Unit(8, 11).shard}")
    written, table = writer.index_tar("x", data)
    assert [table.key(i) for i in range(3)] == ["000000008", "000000009", "000000010"]
    assert table.rows["label"].tolist() == [2, 0, 2]
    assert written.summary.classes == 3


def test_class_and_guidance_change_the_image(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=3)
    of = {
        (labels, scale): worker.images(
            manifest_for(url, worker, labels=labels, sampling=SETTINGS.model_copy(update={"guidance_scale": scale})),
            Unit(0, 4),
        )[0]
        for labels, scale in [("0", 1.0), ("1", 1.0), ("1", 4.0), ("none", 1.0)]
    }
    values = list(of.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(worker: SampleWorker, tmp_path: Path, precision: str) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    wide = worker.images(manifest_for(url, worker), Unit(0, 8))[0].float()
    settings = SETTINGS.model_copy(update={"precision": precision})
    images = worker.images(manifest_for(url, worker, sampling=settings), Unit(0, 8))[0].float()
    assert (images - wide).abs().mean() < 16
    assert torch.equal(images, wide) == (precision == "fp32")


@pytest.mark.parametrize("change", [{"device": "cpu SPARC"}, {"threads": 64}, {"torch": "1.0"}])
def test_a_worker_that_would_make_other_images_refuses(
    worker: SampleWorker, tmp_path: Path, change: dict[str, object]
) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    other = Fingerprint.model_validate({**worker.fingerprint().model_dump(), **change})
    task = UnitTask(
        f"file://{tmp_path}/out", manifest_for(url, worker, fingerprint=other).model_dump_json(), Unit(0, 8)
    )
    with pytest.raises(WorkerRefusedError, match="this job is fixed to"):
        worker(task)
    assert not (tmp_path / "out").exists()


def test_probe_finds_a_power_of_two_within_the_bound(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=2)
    free = SamplingConfig(sampler="ddim", steps=4, unit_size=8, guidance_scale=2.0)
    assert worker(ProbeTask(url, free.model_dump_json(), 64)) == Probe(worker.fingerprint(), 8)
    assert worker(ProbeTask(url, free.model_dump_json(), 4)).batch_size == 4
    assert worker(ProbeTask(url, SETTINGS.model_dump_json(), 64)).batch_size == 4
    assert worker.loads == 1


def test_probe_names_settings_that_cannot_work(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    settings = SamplingConfig(sampler="ddim", steps=21)
    with pytest.raises(ConfigError, match=r"sampling\.steps: 21"):
        worker(ProbeTask(url, settings.model_dump_json(), 64))


def test_a_diverged_snapshot_is_named(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    network, diffusion = snapshot.load_snapshot(url)
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    snapshot.save_snapshot(url, network, network.config, diffusion, {"kind": "ema", "step": 10})
    with pytest.raises(SamplingError, match=r"images 4\.\.7 are not finite"):
        worker.images(manifest_for(url, worker), Unit(4, 8))


def test_a_receipt_comes_back_from_its_bytes(worker: SampleWorker, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=2)
    receipt = worker(UnitTask(f"file://{tmp_path}/out", manifest_for(url, worker).model_dump_json(), Unit(0, 8)))
    assert Receipt.load(receipt.dump()) == receipt
    assert isinstance(receipt.written.info, ShardInfo)
    assert receipt.written.info.samples == 8
