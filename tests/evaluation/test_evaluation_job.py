"""Evaluations end to end: the numbers are those of one process with other people's code; what is wrong is said."""

import io
import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist import rng, snapshot, storage
from ddpm_dist.cluster.pool import Done
from ddpm_dist.commands import make_shards
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.stream import iterate
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.diffusion.likelihood import bits_per_dim
from ddpm_dist.diffusion.ode import log_likelihood
from ddpm_dist.errors import ConfigError, DdpmDistError, EvaluationError
from ddpm_dist.evaluation import follow as following, job, ranking, result
from ddpm_dist.evaluation.distances import frechet_of_features, kid, prdc
from ddpm_dist.evaluation.given import load_given
from ddpm_dist.evaluation.moments import in_first_half
from ddpm_dist.evaluation.order import Order
from ddpm_dist.evaluation.worker import EvaluationWorker, SummaryTask
from ddpm_dist.recipe import parse_config
from ddpm_dist.sampling import job as sampling_job
from ddpm_dist.sampling.worker import UnitTask
from ddpm_dist.training.events import read_events
from ddpm_dist.training.run_folder import snapshot_url, write_summary
from tests.ray_local import RayCluster
from tests.sampling.tiny import SETTINGS, make_order, make_snapshot

CLUSTER = ClusterConfig(wait_seconds=240)
PIXEL = ("frechet_pixel",)


class InProcess:
    """Stands in for the pool: three workers in this process, each task at another one, the last tasks first."""

    def __init__(self) -> None:
        self.workers = [EvaluationWorker(ClusterConfig()) for _ in range(3)]
        self.alive = 3
        self.tasks: list[object] = []

    def map(self, tasks):  # type: ignore[no-untyped-def]
        for number, task in enumerate(reversed(list(tasks))):
            self.tasks.append(task)
            yield Done(task, self.workers[number % 3](task))


def evaluate(order: Order, pool: InProcess | None = None) -> dict[str, object]:
    return job.evaluate(order, pool or InProcess(), 3, CLUSTER)  # type: ignore[arg-type]


def pictures(count: int, seed: int, size: int = 8) -> Tensor:
    """[N, 1, H, W] uint8: blobs, so that their distances are neither 0 nor those of noise."""
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return (128 + 100 * smooth + 5 * seed).clamp(0, 255).to(torch.uint8)


def make_set(url: str, images: Tensor, per_shard: int = 37) -> str:
    shards = []
    for start in range(0, len(images), per_shard):
        part = images[start : start + per_shard].permute(0, 2, 3, 1).numpy()
        encoded = [EncodedSample(f"{start + i:06d}", encode_png(image), "png") for i, image in enumerate(part)]
        shards.append(write_shard(url, f"shard-{start:06d}.tar", encoded))
    write_index(url, shards)
    return url


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    """(samples, data) without a manifest: 3-channel pixels when evaluated."""
    return make_set(f"file://{tmp_path}/samples", pictures(130, 1)), make_set(
        f"file://{tmp_path}/data", pictures(201, 2)
    )


def as_features(url: str) -> Tensor:
    images = np.stack([sample.image for sample in iterate(url, channels=3)])
    return torch.from_numpy(images).flatten(1).double() / 255


def test_numbers_are_those_of_one_process(sets: tuple[str, str]) -> None:
    samples, data = sets
    found = evaluate(Order(samples=samples, data=data, metrics=("frechet_pixel", "kid_pixel", "prdc_pixel")))
    own, real = as_features(samples), as_features(data)
    values = found["metrics"]
    assert isinstance(values, dict)
    assert values["frechet_pixel"] == pytest.approx(frechet_of_features(own, real), rel=1e-5)
    assert values["kid_pixel"] == pytest.approx(kid(own, real)[0], rel=0.05)
    expected = prdc(real.float(), own.float())
    assert {name: values[f"{name}_pixel"] for name in expected} == pytest.approx(expected, abs=1e-9)
    half = in_first_half(torch.arange(201))
    floor = frechet_of_features(real[half], real[~half])
    assert values["frechet_pixel_floor"] == pytest.approx(floor, rel=1e-5)
    assert (found["num_samples"], found["reference"]["num_samples"]) == (130, 201)  # type: ignore[index]


def test_the_first_n_samples(sets: tuple[str, str]) -> None:
    samples, data = sets
    found = evaluate(Order(samples=samples, data=data, metrics=PIXEL, num_samples=100))
    expected = frechet_of_features(as_features(samples)[:100], as_features(data))
    assert found["metrics"]["frechet_pixel"] == pytest.approx(expected, rel=1e-7)  # type: ignore[index]
    assert "-100-against-201-of-" in str(found["name"])


def test_statistics_are_made_once(sets: tuple[str, str]) -> None:
    samples, data = sets
    first, second = InProcess(), InProcess()
    order = Order(samples=samples, data=data, metrics=PIXEL)
    values = [evaluate(order, pool)["metrics"] for pool in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert [any(data in str(task) for task in pool.tasks) for pool in (first, second)] == [True, False]
    stored = [name for name in storage.list_objects(data) if name.startswith("statistics/")]
    stored = [name for name in stored if name.endswith(".npz")]
    assert len(stored) == 1
    given = evaluate(replace(order, data=None, reference=storage.join(data, stored[0])))
    assert given["metrics"]["frechet_pixel"] == pytest.approx(values[0]["frechet_pixel"], rel=1e-9)  # type: ignore[index]
    storage.publish(storage.join(data, stored[0]), b"spoilt")
    assert evaluate(order)["metrics"] == pytest.approx(values[0], rel=1e-12)


def test_statistics_of_others(sets: tuple[str, str], tmp_path: Path) -> None:
    """mu and sigma, as pytorch-fid writes them."""
    samples, data = sets
    real = as_features(data).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    storage.publish(f"file://{tmp_path}/theirs.npz", buffer.getvalue())
    found = evaluate(Order(samples=samples, reference=f"file://{tmp_path}/theirs.npz", metrics=PIXEL))
    expected = frechet_of_features(as_features(samples), torch.from_numpy(real))
    assert found["metrics"] == {"frechet_pixel": pytest.approx(expected, rel=1e-5)}
    assert any("no floor" in warning for warning in found["warnings"])  # type: ignore[attr-defined]


def test_straight_from_a_snapshot_without_keeping_images(sets: tuple[str, str], tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    out = f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=30, sampling=SETTINGS, out=out, nearest=4)
    found = evaluate(order)
    sampling_job.run([make_order(url, f"file://{tmp_path}/kept", 30)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    kept = evaluate(Order(samples=f"file://{tmp_path}/kept", data=sets[1], metrics=PIXEL))
    assert found["metrics"] == pytest.approx(kept["metrics"], rel=1e-9)
    assert storage.list_objects(storage.join(out, "unkept")) == {}
    assert result.results(out) == [json.loads(json.dumps(found))]
    lines = storage.read(storage.join(out, "results.jsonl")).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10]
    assert storage.exists(str(found["grid"]))
    nearest = found["nearest"]
    assert isinstance(nearest, dict)
    assert len(nearest["distances"]) == 4
    assert storage.exists(nearest["picture"])


def test_nearest_images_are_found_over_all_parts(sets: tuple[str, str]) -> None:
    data = sets[1]
    found = evaluate(Order(samples=data, data=data, metrics=PIXEL, nearest=5))["nearest"]
    assert isinstance(found, dict)
    assert found["indices"] == [0, 1, 2, 3, 4]
    assert max(found["distances"]) < 1e-4


def test_bits_per_dim_is_the_mean_over_the_set(tmp_path: Path, sets: tuple[str, str]) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    held_out = make_set(f"file://{tmp_path}/held-out", pictures(11, 5), per_shard=4)
    order = Order(samples=sets[0], snapshot=None, data=sets[1], held_out=held_out, metrics=("bits_per_dim",))
    with pytest.raises(EvaluationError, match="bits_per_dim: needs a snapshot"):
        evaluate(order)
    sampling_job.run([make_order(url, f"file://{tmp_path}/out", 8)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    found = evaluate(replace(order, samples=f"file://{tmp_path}/out"))["metrics"]
    network, diffusion = snapshot.load_snapshot(url)
    x = torch.from_numpy(np.stack([sample.image for sample in iterate(held_out, channels=1)])).float() / 127.5 - 1
    bits = bits_per_dim(network, diffusion, x, seed=0, indices=torch.arange(11))
    assert found == {
        "bits_per_dim": pytest.approx(float(bits.total.mean()), rel=1e-5),
        "bits_per_dim_prior": pytest.approx(float(bits.prior.mean()), rel=1e-9),
        "bits_per_dim_decoder": pytest.approx(float(bits.terms[:, 0].mean()), rel=1e-5),
    }


def test_bits_per_dim_of_a_continuous_process_is_the_odes(tmp_path: Path, sets: tuple[str, str]) -> None:
    """Of dequantised pixels, without the bound's parts; a network that hardly does anything leaves the prior's bits."""
    url = make_snapshot(f"file://{tmp_path}/snapshot", process="flow")
    held_out = make_set(f"file://{tmp_path}/held-out", pictures(3, 5))
    order = Order(snapshot=url, data=sets[1], held_out=held_out, metrics=("bits_per_dim",), num_samples=4)
    sampling = SETTINGS.model_copy(update={"steps": 2})
    found = evaluate(replace(order, sampling=sampling, out=f"file://{tmp_path}/out"))["metrics"]
    network, diffusion = snapshot.load_snapshot(url)
    x = torch.from_numpy(np.stack([sample.image for sample in iterate(held_out, channels=1)])).float() / 127.5 - 1
    noise = rng.uniform(0, rng.Purpose.LIKELIHOOD, torch.arange(3), (1, 8, 8), rng.MAX_STEP) - 0.5
    nats = log_likelihood(network, diffusion, x + noise / 127.5, seed=0, indices=torch.arange(3), tolerance=1e-5)
    expected = float((-nats / (64 * math.log(2)) + math.log2(127.5)).mean())
    assert found == {"bits_per_dim": pytest.approx(expected, rel=1e-4)}
    assert 0 < expected < 20


def test_bits_per_dim_of_images_without_labels_takes_the_null_class(tmp_path: Path, sets: tuple[str, str]) -> None:
    url, images = make_snapshot(f"file://{tmp_path}/snapshot", num_classes=2), pictures(5, 5)
    held_out = make_set(f"file://{tmp_path}/held-out", images)
    order = Order(snapshot=url, data=sets[1], held_out=held_out, metrics=("bits_per_dim",), num_samples=4)
    found = evaluate(replace(order, sampling=SETTINGS, out=f"file://{tmp_path}/out"))["metrics"]
    network, diffusion = snapshot.load_snapshot(url)
    null, x = torch.full((5,), 2), images.float() / 127.5 - 1
    bits = bits_per_dim(network, diffusion, x, seed=0, indices=torch.arange(5), labels=null)
    assert found["bits_per_dim"] == pytest.approx(float(bits.total.mean()), rel=1e-5)  # type: ignore[index]


def test_indexes_that_lie_elsewhere(tmp_path: Path, sets: tuple[str, str]) -> None:
    """Sets that can't be written to: all passes over them take their index, and statistics are kept beside it."""
    held_out = make_set(f"file://{tmp_path}/held-out", pictures(11, 5))
    wanted = evaluate(Order(samples=sets[0], data=sets[1], metrics=PIXEL, nearest=3))
    homes = []
    for url in (sets[1], held_out):
        place, home = Path(url.removeprefix("file://")), Path(f"{url.removeprefix('file://')}-index")
        home.mkdir()
        for name in ("index.json", "index"):
            (place / name).rename(home / name)
        homes.append(f"file://{home}")
    shutil.rmtree(tmp_path / "data/statistics")
    order = Order(samples=sets[0], data=sets[1], data_index=homes[0], metrics=PIXEL, nearest=3)
    found = evaluate(order)
    assert found["metrics"] == wanted["metrics"]
    assert found["nearest"] == wanted["nearest"]
    assert found["question"] == wanted["question"]
    assert found["reference"]["index"] == homes[0]  # type: ignore[index]
    assert (tmp_path / "data-index/statistics").is_dir()
    assert not (tmp_path / "data/statistics").exists()
    out, url = f"file://{tmp_path}/out", make_snapshot(f"file://{tmp_path}/snapshot")
    sampling_job.run([make_order(url, out, 8)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    bits = replace(order, samples=out, held_out=held_out, held_out_index=homes[1], metrics=("bits_per_dim",), nearest=0)
    assert "bits_per_dim" in evaluate(bits)["metrics"]  # type: ignore[operator]
    with pytest.raises(EvaluationError, match=f"--held-out-index {homes[1]}: of which set"):
        evaluate(replace(bits, held_out=None))


def test_warnings(tmp_path: Path, sets: tuple[str, str]) -> None:
    url = make_snapshot(f"file://{tmp_path}/raw", kind="raw")
    out = f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    large = make_set(f"file://{tmp_path}/large", pictures(60, 3, size=12))
    said = " | ".join(evaluate(Order(samples=out, data=large, metrics=PIXEL))["warnings"])  # type: ignore[arg-type]
    assert "20 samples are few" in said
    assert "the weights are raw, not EMA" in said
    assert "pixel: 20 images" in said
    assert "the reference's images of 12 to 12 px were resized and cropped to 8 px" in said
    bits = Order(samples=out, data=sets[1], held_out=large, metrics=("bits_per_dim",))
    assert "--held-out's images of 12 to 12 px were resized" in " | ".join(evaluate(bits)["warnings"])  # type: ignore[arg-type]
    assert "no manifest" in " ".join(evaluate(Order(samples=sets[0], data=sets[1], metrics=PIXEL))["warnings"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": None}, "give one of --samples and --snapshot"),
        ({"snapshot": "memory://x"}, "give one of --samples and --snapshot"),
        ({"data": None}, "give one of --data and --reference"),
        (
            {"metrics": ("fvd_lite0",)},
            "'fvd_lite0' is unknown; a metric is <kind>_<network> with a kind of frechet",
        ),
        ({"metrics": ("fid",)}, r"where are the weights of inception\? Give --network inception=URL"),
        ({"metrics": ()}, "name at least one"),
        ({"metrics": ("is_pixel",)}, "pixel has no classes; use inception"),
        ({"num_samples": 131}, "--num-samples 131: .* has 130; draw more"),
    ],
)
def test_orders_that_cannot_be(sets: tuple[str, str], change: dict[str, object], message: str) -> None:
    order = replace(Order(samples=sets[0], data=sets[1], metrics=PIXEL), **change)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=message):
        evaluate(order)


def test_what_does_not_fit_is_said_before_images_are_drawn(sets: tuple[str, str], tmp_path: Path) -> None:
    """Weights, statistics and metrics that can't work: hours of sampling would be lost to them."""
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/evaluation"
    storage.publish(f"file://{tmp_path}/weights.pth", b"no weights")
    wrong = {"inception": f"file://{tmp_path}/weights.pth#sha256={'0' * 64}"}
    small = io.BytesIO()
    np.savez(small, mu=np.zeros(3), sigma=np.eye(3))
    fitting = io.BytesIO()
    np.savez(fitting, mu=np.zeros(64), sigma=np.eye(64))
    storage.publish(f"file://{tmp_path}/small.npz", small.getvalue())
    storage.publish(f"file://{tmp_path}/fitting.npz", fitting.getvalue())
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=16, sampling=SETTINGS, out=out)
    cases = [
        (replace(order, metrics=("fid",), networks=wrong), f"its SHA-256 is .*, not {'0' * 64}"),
        (replace(order, data=None, reference=f"file://{tmp_path}/small.npz"), "mean has 3 features, pixel has 64"),
        (
            replace(order, data=None, reference=f"file://{tmp_path}/fitting.npz", metrics=("kid_pixel",)),
            "kid_pixel: needs the reference's images",
        ),
        (replace(order, metrics=("sfid_pixel",)), "sfid_pixel: pixel has no spatial features"),
        (replace(order, metrics=("is_pixel",)), "is_pixel: pixel has no classes"),
    ]
    for bad, message in cases:
        pool = InProcess()
        with pytest.raises(EvaluationError, match=message):
            evaluate(bad, pool)
        assert pool.tasks == []
    assert storage.list_objects(out) == {}


def test_samples_that_are_not_there_yet(sets: tuple[str, str], tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    storage.delete(f"{out}/index.json")
    with pytest.raises(EvaluationError, match="its sampling job has not finished; start ddpm-sample"):
        evaluate(Order(samples=out, data=sets[1], metrics=PIXEL))
    with pytest.raises(EvaluationError, match="no samples are there; ddpm-sample"):
        evaluate(Order(samples=f"file://{tmp_path}/nowhere", data=sets[1], metrics=PIXEL))


def test_samples_that_are_no_longer_there(sets: tuple[str, str], tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    order = Order(samples=out, data=sets[1], metrics=PIXEL)
    lost = "samples-000000008-000000016.tar"
    storage.publish(f"{out}/{lost}", storage.read(f"{out}/{lost}")[:1024])
    with pytest.raises(
        EvaluationError, match=rf"1 of 3 shards are missing or cut, the first is {lost}; start ddpm-sample"
    ):
        evaluate(order)
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    assert evaluate(order)["num_samples"] == 20
    storage.delete(f"{sets[0]}/shard-000037.tar")
    with pytest.raises(EvaluationError, match=r"1 of 4 shards are missing .*shard-000037.tar; restore them"):
        evaluate(replace(order, samples=sets[0]))


def test_references_that_do_not_fit(sets: tuple[str, str], tmp_path: Path) -> None:
    evaluate(Order(samples=sets[0], data=sets[1], metrics=PIXEL))
    statistics = next(name for name in storage.list_objects(sets[1]) if name.endswith(".npz"))
    large = make_set(f"file://{tmp_path}/large", pictures(60, 3, size=12))
    cases = {
        storage.join(
            sets[1], statistics
        ): "statistics of images of another size: 8 px, 3 channels; the samples have 12 px"
    }
    for name, arrays, message in [
        ("empty", {"x": np.zeros(3)}, "has no mu and sigma; it holds x"),
        ("skew", {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu \(3,\) and sigma \(2, 2\) don't fit"),
        ("small", {"mu": np.zeros(3), "sigma": np.eye(3)}, "its mean has 3 features, pixel has 432"),
    ]:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        storage.publish(f"file://{tmp_path}/{name}.npz", buffer.getvalue())
        cases[f"file://{tmp_path}/{name}.npz"] = message
    storage.publish(f"file://{tmp_path}/text.npz", b"hello")
    cases[f"file://{tmp_path}/text.npz"] = "text.npz: not an .npz file, or damaged; give one"
    cases[f"file://{tmp_path}/none.npz"] = "--reference .*none.npz: not found"
    for url, message in cases.items():
        with pytest.raises(EvaluationError, match=message):
            evaluate(Order(samples=large, reference=url, metrics=PIXEL))


def save_npz(url: str, **arrays: object) -> str:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    storage.publish(url, buffer.getvalue())
    return url


def script_network(url: str, factor: float = 1.0) -> str:
    """A TorchScript network of 12 features."""

    class Means(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) * self.factor

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Means(factor)), buffer)
    storage.publish(url, buffer.getvalue())
    return url


def test_our_statistics_say_of_which_network_and_size_they_are(sets: tuple[str, str], tmp_path: Path) -> None:
    """Not by the file's name: a copy under any name is taken, and refused for another network of as many features."""
    mine, other = (script_network(f"file://{tmp_path}/{n}.pt", factor) for n, factor in (("a", 1.0), ("b", 2.0)))
    order = Order(samples=sets[0], data=sets[1], metrics=("frechet_net", "prdc_net"), networks={"net": mine})
    values = evaluate(order)["metrics"]
    stored = next(name for name in storage.list_objects(sets[1]) if name.endswith(".npz"))
    copy = f"file://{tmp_path}/renamed-64px.npz"
    storage.publish(copy, storage.read(f"{sets[1]}/{stored}"))
    again = replace(order, data=None, reference=copy)
    found = evaluate(again)
    assert found["metrics"]["frechet_net"] == pytest.approx(values["frechet_net"], rel=1e-9)  # type: ignore[index]
    assert "of which network" not in " ".join(found["warnings"])  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=r"statistics of the network net \(.*\); the metric asks for net"):
        evaluate(replace(again, networks={"net": other}))
    old = {n: a for n, a in np.load(io.BytesIO(storage.read(copy))).items() if n != "about"}
    with pytest.raises(EvaluationError, match="doesn't say which network and size it is of"):
        evaluate(replace(again, reference=save_npz(copy, **old)))
    kept_name = save_npz(f"file://{tmp_path}/{stored.rpartition('/')[2]}", **old)
    assert evaluate(replace(again, reference=kept_name))["metrics"] == found["metrics"]


def test_statistics_of_other_programs(sets: tuple[str, str], tmp_path: Path) -> None:
    """Features (pool_3) serve all metrics; ADM's file is taken for what it is; nothing pickled is read."""
    samples, data = sets
    real = as_features(data).numpy()
    order = Order(samples=samples, data=data, metrics=("frechet_pixel", "kid_pixel", "prdc_pixel"))
    values = evaluate(order)["metrics"]
    pool = save_npz(f"file://{tmp_path}/pool.npz", pool_3=real, logits=np.zeros((len(real), 10)))
    found = evaluate(replace(order, data=None, reference=pool))
    assert found["metrics"]["frechet_pixel"] == pytest.approx(values["frechet_pixel"], rel=1e-5)  # type: ignore[index]
    assert found["metrics"]["recall_pixel"] == values["recall_pixel"]  # type: ignore[index]
    assert "don't say of which network they are: they are taken for pixel's" in " ".join(found["warnings"])  # type: ignore[arg-type]
    mu, sigma = real.mean(0), np.cov(real, rowvar=False)
    adm = save_npz(f"file://{tmp_path}/adm.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8), mu=mu, sigma=sigma)
    one = replace(order, data=None, metrics=PIXEL)
    assert evaluate(replace(one, reference=adm))["metrics"] == {
        "frechet_pixel": pytest.approx(values["frechet_pixel"], rel=1e-5)  # type: ignore[index]
    }
    given = load_given(
        save_npz(f"file://{tmp_path}/s.npz", mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3]), (8, 3), {}
    )
    assert given[0].spatial is not None
    pickled = io.BytesIO()
    np.save(pickled, {"mu": mu}, allow_pickle=True)  # type: ignore[arg-type]
    storage.publish(f"file://{tmp_path}/dict.npy", pickled.getvalue())
    storage.publish(f"file://{tmp_path}/edm2.pkl", pickle.dumps({"fid": {"mu": mu}}))
    skew = sigma.copy()
    skew[0, 1] += 1
    cases = {
        f"file://{tmp_path}/dict.npy": r"it is pickled, .* Save it anew: python -c",
        f"file://{tmp_path}/edm2.pkl": r"it is pickled, .*EDM2's: d = d\['fid'\]",
        save_npz(f"file://{tmp_path}/nan.npz", mu=mu * np.nan, sigma=sigma): "its mu holds NaN or infinities",
        save_npz(f"file://{tmp_path}/text.npz", mu=np.array(["a"]), sigma=sigma): "its mu holds <U1, not numbers",
        save_npz(f"file://{tmp_path}/skew.npz", mu=mu, sigma=skew): "sigma is not symmetric",
    }
    for url, message in cases.items():
        with pytest.raises(EvaluationError, match=message):
            evaluate(replace(one, reference=url))
    with pytest.raises(EvaluationError, match="statistics are of one network, the metrics use pixel, lite0"):
        evaluate(replace(one, reference=adm, metrics=("frechet_pixel", "frechet_lite0")))


def test_images_as_a_reference_become_a_data_set_by_the_command_that_is_named(
    sets: tuple[str, str], tmp_path: Path
) -> None:
    """ADM's batches of samples hold arr_0 alone."""
    samples, data = sets
    images = np.stack([sample.image.transpose(1, 2, 0) for sample in iterate(data, channels=3)])
    batch = save_npz(f"file://{tmp_path}/images.npz", arr_0=images)
    order = Order(samples=samples, reference=batch, metrics=("frechet_pixel", "prdc_pixel"))
    with pytest.raises(EvaluationError, match=r"it holds images \(arr_0\).* give it as --data URL") as refused:
        evaluate(order)
    named = str(refused.value).split("`ddpm-shards make ")[1].split("`")[0]
    make_shards.main(named.replace("URL", f"file://{tmp_path}/made").split())
    found = evaluate(replace(order, reference=None, data=f"file://{tmp_path}/made"))["metrics"]
    expected = evaluate(replace(order, reference=None, data=data))["metrics"]
    assert found["frechet_pixel"] == pytest.approx(expected["frechet_pixel"], rel=1e-5)  # type: ignore[index]
    assert found["recall_pixel"] == expected["recall_pixel"]  # type: ignore[index]


def test_a_nan_is_never_a_distance(sets: tuple[str, str], tmp_path: Path) -> None:
    """In a network's features, and in stored statistics, which are made anew."""
    broken = script_network(f"file://{tmp_path}/nan.pt", float("nan"))
    order = Order(samples=sets[0], data=sets[1], metrics=("frechet_net",), networks={"net": broken})
    with pytest.raises(EvaluationError, match=r"data: the features of image [0-9]+ are not finite in net"):
        evaluate(order)
    whole = evaluate(replace(order, metrics=PIXEL))["metrics"]
    stored = next(name for name in storage.list_objects(sets[1]) if name.endswith(".npz"))
    arrays = dict(np.load(io.BytesIO(storage.read(f"{sets[1]}/{stored}"))).items())
    save_npz(f"{sets[1]}/{stored}", **{**arrays, "totals": arrays["totals"] * np.nan})
    assert evaluate(replace(order, metrics=PIXEL))["metrics"] == whole


def test_a_network_that_gives_features_when_asked(sets: tuple[str, str], tmp_path: Path) -> None:
    """As NVIDIA's Inception: class probabilities without return_features."""

    class Detector(torch.nn.Module):
        def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
            means = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
            return means if return_features else means.softmax(1)[:, :3]

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Detector()), buffer)
    storage.publish(f"file://{tmp_path}/detector.pt", buffer.getvalue())
    order = Order(
        samples=sets[0], data=sets[1], metrics=("frechet_net",), networks={"net": f"file://{tmp_path}/detector.pt"}
    )
    assert evaluate(order)["networks"]["net"]["features"] == 12  # type: ignore[index]


def test_the_floor_is_of_as_many_images_as_the_value(sets: tuple[str, str]) -> None:
    """Half the reference at most; and the floor is remembered for each number."""
    real, order = as_features(sets[1]), Order(samples=sets[0], data=sets[1], metrics=("frechet_pixel", "prdc_pixel"))
    floors = {}
    for count in (60, 90, 130):
        found = evaluate(replace(order, num_samples=count))
        floors[count] = found["metrics"]["frechet_pixel_floor"]  # type: ignore[index]
        sides = (count, 201 - count) if count <= 100 else (101, 100)
        said = found["reference"]["floors"]["pixel"]  # type: ignore[index]
        assert said in [f"between {a} and {b} real images" for a, b in (sides, sides[::-1])]
    assert floors[60] > floors[90] > floors[130]
    priorities = rng.uniform(2, 0, torch.arange(201))
    chosen = torch.argsort(priorities)[:60]
    others = torch.ones(201, dtype=torch.bool)
    others[chosen] = False
    assert floors[60] == pytest.approx(frechet_of_features(real[chosen], real[others]), rel=1e-5)


def test_duplicates_stand_in_the_result(tmp_path: Path, sets: tuple[str, str]) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    order = Order(samples=out, data=sets[1], metrics=PIXEL)
    assert evaluate(order)["duplicates"] == 0
    first, second = (f"{out}/receipts/{name}.json" for name in ("000000000-000000008", "000000008-000000016"))
    receipt = {**json.loads(storage.read(second)), "digests": json.loads(storage.read(first))["digests"]}
    storage.publish(second, json.dumps(receipt).encode())
    found = evaluate(order)
    assert found["duplicates"] == 8
    assert "8 of 20 samples equal an earlier one" in " ".join(found["warnings"])  # type: ignore[arg-type]
    assert evaluate(replace(order, num_samples=8))["duplicates"] == 0


def test_samples_as_other_programs_have_them(tmp_path: Path, sets: tuple[str, str]) -> None:
    storage.publish(f"file://{tmp_path}/pngs/1.png", b"png")
    for url, message in (
        (f"file://{tmp_path}/pngs", "but image files; ddpm-shards make folder FOLDER URL"),
        (f"file://{tmp_path}/samples.npz", "ddpm-shards make npz FILE URL"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(Order(samples=url, data=sets[1], metrics=PIXEL))


def run_config(url: str, data: str, **evaluation: object):  # type: ignore[no-untyped-def]
    return parse_config(
        f"""
        run: {{url: {url}}}
        data: {{url: {data}, image_size: 8, channels: 1}}
        model: {{channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [4], norm_groups: 4}}
        diffusion: {{timesteps: 20}}
        train: {{steps: 30, global_batch: 4}}
        sampling: {{sampler: ddim, steps: 4, unit_size: 8, batch_size: 4}}
        evaluation: {json.dumps({"metrics": ["frechet_pixel"], "num_samples": 16, **evaluation})}
        """
    )


def publish_snapshot(run_url: str, step: int) -> None:
    url = make_snapshot(f"{run_url}/made", seed=step)
    network, diffusion = snapshot.load_snapshot(url)
    info = {**snapshot.load_info(url), "step": step}
    snapshot.save_snapshot(snapshot_url(run_url, step), network, network.config, diffusion, info)


def test_follows_a_run_evaluating_each_snapshot_once(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower is broken off in the middle of an evaluation and started again while snapshots come."""
    run = f"file://{tmp_path}/run"
    cfg = run_config(run, sets[1])
    order = Order(data=sets[1], metrics=PIXEL, num_samples=16, sampling=cfg.sampling)
    question = following.question_of(cfg, order)
    curve = f"{run}/tensorboard/evaluation/16-{question.id[:8]}"
    evaluated: list[int] = []

    def in_process(one: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, object]:
        step = int(str(one.snapshot)[-9:])
        evaluated.append(step)
        if evaluated.count(step) == 1 and step == 20:
            raise KeyboardInterrupt
        found = evaluate(one)
        if step == 20:
            publish_snapshot(run, 30)
        return found

    monkeypatch.setattr(following.job, "run", in_process)
    publish_snapshot(run, 10)
    publish_snapshot(run, 20)
    with pytest.raises(KeyboardInterrupt):
        following.follow(cfg, order, (1, 2), poll_s=0.01)
    assert following.follow(cfg, order, (1, 2), poll_s=0.01) == 2
    assert evaluated == [10, 20, 20, 30]
    folder = f"{run}/evaluation"
    drawn = storage.list_names(curve)
    assert len([name for name in drawn if "tfevents" in name]) == 3
    for name in (f"{folder}/best.json", f"{folder}/report.html", f"{curve}/{drawn[-1]}"):
        storage.delete(name)  # as if it had been killed right after its last result
    assert following.follow(cfg, order, (1, 2), poll_s=0.01) == 0
    found = result.results(folder)
    assert [one["step"] for one in found] == [10, 20, 30]
    best = min(found, key=lambda one: one["metrics"]["frechet_pixel"])
    assert json.loads(storage.read(f"{folder}/best.json"))["step"] == best["step"]
    assert read_events(run).scalars == {}, "the training's curves are apart"
    assert len([name for name in storage.list_names(curve) if "tfevents" in name]) == 3
    assert b"Fr\xc3\xa9chet pixel" in storage.read(f"{folder}/report.html")


@pytest.fixture
def followed(sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(configuration, order, function that follows and returns the steps it evaluated) of a run with 20 and 30."""
    run, evaluated = f"file://{tmp_path}/run", list[int]()
    cfg = run_config(run, sets[1])
    for step in (20, 30):
        publish_snapshot(run, step)

    def in_process(one: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, object]:
        found = evaluate(one)
        evaluated.append(int(str(one.snapshot)[-9:]))
        return found

    def follow(order: Order, quiet_s: float = 60) -> list[int]:
        evaluated.clear()
        following.follow(cfg, order, (1, 2), poll_s=0.01, quiet_s=quiet_s)
        return list(evaluated)

    monkeypatch.setattr(following.job, "run", in_process)
    return cfg, Order(data=sets[1], metrics=PIXEL, num_samples=16, sampling=cfg.sampling), follow


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 12},
        {"seed": 1},
        {"sampling": SETTINGS.model_copy(update={"steps": 2})},
        {"metrics": ("kid_pixel",)},
        {"data": "OTHER"},
        {"data": None, "reference": "STATISTICS"},
    ],
)
def test_another_question_is_another_evaluation(followed, tmp_path: Path, change: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    """Two questions about one run: both are answered, and neither ranks among the other's answers."""
    cfg, order, follow = followed
    make_set(f"file://{tmp_path}/other", pictures(150, 4))
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(64), sigma=np.eye(64))
    storage.publish(f"file://{tmp_path}/theirs.npz", buffer.getvalue())
    places = {"OTHER": f"file://{tmp_path}/other", "STATISTICS": f"file://{tmp_path}/theirs.npz"}
    other = replace(order, **{key: places.get(str(value), value) for key, value in change.items()})
    assert follow(order) == [20, 30]
    first = json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))
    assert follow(other) == [20, 30]
    assert follow(order) == follow(other) == []
    folder = f"{cfg.run.url}/evaluation"
    second = json.loads(storage.read(f"{folder}/best.json"))
    assert second["question"] != first["question"]
    mine = [r for r in result.results(folder) if r["question"]["id"] == second["question"]]
    best = min(mine, key=lambda r: r["metrics"][second["metric"]])
    assert (second["step"], second["value"]) == (best["step"], best["metrics"][second["metric"]])
    assert [(o["question"], o["step"], o["value"]) for o in second["others"]] == [
        (first["question"], first["step"], first["value"])
    ]
    assert len(storage.list_names(f"{cfg.run.url}/tensorboard/evaluation")) == 2


def test_what_does_not_alter_the_numbers_is_no_other_question(followed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The set at another place, other layout of the samples, the order of the metrics, metrics by their short names."""
    _, order, follow = followed
    two = replace(order, metrics=("frechet_pixel", "kid_pixel"))
    assert follow(two) == [20, 30]
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    layout = SETTINGS.model_copy(update={"unit_size": 4, "batch_size": 2, "format": "raw"})
    assert follow(replace(two, metrics=("kid_pixel", "frechet_pixel"), sampling=layout)) == []
    assert follow(replace(two, data=f"file://{tmp_path}/moved", labels="none")) == []


def test_kept_samples_answer_the_same_question_as_drawn_ones(sets: tuple[str, str], tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    kept = evaluate(Order(samples=out, data=sets[1], metrics=PIXEL))
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=20, sampling=SETTINGS)
    drawn = evaluate(replace(order, out=f"file://{tmp_path}/evaluation"))
    assert (kept["name"], kept["question"], kept["answers"]) == (drawn["name"], drawn["question"], drawn["answers"])
    fewer = evaluate(Order(samples=out, data=sets[1], metrics=PIXEL, num_samples=10))
    assert fewer["name"] != kept["name"]
    assert fewer["answers"] != kept["answers"]


def test_results_of_the_first_version_are_not_ranked_and_not_taken_for_answers(followed) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    assert follow(order) == [20, 30]
    folder = f"{cfg.run.url}/evaluation"
    for found in result.results(folder):
        old = {
            key: value for key, value in found.items() if key not in ("question", "answers", "labels", "finished_at")
        }
        storage.delete(f"{folder}/results/{found['name']}.json")
        old["name"] = f"{found['step']:09d}-16-against-201-of-01234567-89abcdef"
        old["metrics"] = {"frechet_pixel": 0.0}
        storage.publish(f"{folder}/results/{old['name']}.json", json.dumps(old).encode())
    assert follow(order) == [20, 30]
    assert len(result.results(folder)) == 4
    assert json.loads(storage.read(f"{folder}/best.json"))["value"] > 0
    assert b"is not ranked" in storage.read(f"{folder}/report.html")


def test_a_snapshot_that_was_made_anew_is_evaluated_anew(followed) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    assert follow(order) == [20, 30]
    network, diffusion = snapshot.load_snapshot(snapshot_url(cfg.run.url, 30))
    info = {**snapshot.load_info(snapshot_url(cfg.run.url, 30)), "step": 20}
    snapshot.save_snapshot(snapshot_url(cfg.run.url, 20), network, network.config, diffusion, info)
    assert follow(order) == [20]
    best = json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))
    storage.delete_tree(best["snapshot"])
    assert json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))["step"] == best["step"]
    following.mark_best(cfg.run.url, following.question_of(cfg, order))
    assert json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))["step"] != best["step"], "it is gone"


def damage_weights(url: str) -> None:
    name = f"{url}/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(storage.read(name))
    data[-5] ^= 1
    storage.publish(name, bytes(data))


def damage_info(url: str) -> None:
    storage.publish(f"{url}/ddpm_dist.json", b"{]")


def damage_keys(url: str) -> None:
    info = json.loads(storage.read(f"{url}/ddpm_dist.json"))
    storage.publish(f"{url}/ddpm_dist.json", json.dumps({"format": info["format"], "step": 20}).encode())


def diverge(url: str) -> None:
    network, diffusion = snapshot.load_snapshot(url)
    with torch.no_grad():
        network.conv_out.bias.fill_(torch.nan)
    snapshot.save_snapshot(url, network, network.config, diffusion, snapshot.load_info(url))


@pytest.mark.parametrize("damage", [damage_weights, damage_info, damage_keys, diverge])
def test_one_damaged_snapshot_does_not_keep_the_others(followed, damage) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    damage(snapshot_url(cfg.run.url, 20))
    with pytest.raises(EvaluationError, match=r"1 snapshots evaluated; 1 could not be(?s:.*)\n  step 20: "):
        follow(order)
    folder = f"{cfg.run.url}/evaluation"
    assert [found["step"] for found in result.results(folder)] == [30]
    publish_snapshot(cfg.run.url, 20)
    assert follow(order) == [20]


def test_what_is_wrong_with_the_question_ends_a_follower(followed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    publish_snapshot(cfg.run.url, 10)
    with pytest.raises(DdpmDistError, match=r"data-none/index\.json"):
        follow(replace(order, data=f"{order.data}-none"))

    def broken(*_: object) -> None:
        raise EvaluationError("the data set lost a shard")

    monkeypatch.setattr(following.job, "run", broken)
    with pytest.raises(EvaluationError, match=r"^the data set lost a shard$"):
        follow(order)


def test_a_last_snapshot_that_will_not_come_is_not_waited_for(followed, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    """The run was stopped; then it ends, but its last snapshot was deleted."""
    cfg, order, follow = followed
    caplog.set_level("INFO")
    storage.delete_tree(snapshot_url(cfg.run.url, 30))
    assert follow(order, quiet_s=0.2) == [20]
    assert "waiting for the next snapshot; the last one will be that of step 30" in caplog.text
    assert "the run has shown no sign of life for 0:0" in caplog.text
    assert "and has no snapshot of its last step (30)" in caplog.text
    ended = {"step": 30, "images_seen": 120, "images_per_second": 1.0, "data_wait_fraction": 0.0}
    write_summary(cfg.run.url, ended)
    assert follow(order, quiet_s=30) == []
    assert "has ended at step 30, but its last snapshot is gone" in caplog.text


def test_a_damaged_result_is_said_and_made_anew(followed, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    folder = f"{cfg.run.url}/evaluation"
    follow(order)
    name = next(found["name"] for found in result.results(folder) if found["step"] == 20)
    whole = json.loads(storage.read(f"{folder}/results/{name}.json"))
    strings = {**whole, "metrics": {"frechet_pixel": "1.5"}}
    for spoilt in (b"", b"{", b"[]", b"{}", b"\xff", b'{"metrics": 3}', json.dumps(strings).encode()):
        storage.publish(f"{folder}/results/{name}.json", spoilt)
        caplog.clear()
        assert [found["step"] for found in result.results(folder)] == [30], spoilt
        assert f"{name}.json: damaged, " in caplog.text
    assert follow(order) == [20]
    assert [found["step"] for found in result.results(folder)] == [20, 30]


def test_two_evaluations_of_a_run_leave_each_others_images(followed) -> None:  # type: ignore[no-untyped-def]
    """One with other metrics, one that was killed; a follower removes its own images alone."""
    cfg, order, follow = followed
    folder = f"{cfg.run.url}/evaluation"
    url = snapshot_url(cfg.run.url, 30)
    others = replace(order, metrics=("kid_pixel",)).for_snapshot(url, folder)
    with pytest.raises(KeyboardInterrupt):
        evaluate(others, Broken())
    left = storage.list_objects(f"{folder}/unkept")
    assert left
    assert follow(order) == [20, 30]
    assert storage.list_objects(f"{folder}/unkept") == left
    pool = InProcess()
    evaluate(others, pool)
    assert storage.list_objects(f"{folder}/unkept") == {}
    assert not any(isinstance(task, UnitTask) for task in pool.tasks), "its images were gone on with"


class Broken(InProcess):
    """Is interrupted when the images are drawn."""

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks = list(tasks)
        if isinstance(tasks[0], SummaryTask):
            raise KeyboardInterrupt
        yield from super().map(tasks)


class Overtaken(InProcess):
    """Another evaluation of the same question ends, and removes the images, just before these tasks of ours."""

    def __init__(self, order: Order, kind: type) -> None:
        super().__init__()
        self.order, self.kind, self.overtaken = order, kind, False

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks = list(tasks)
        if not self.overtaken and isinstance(tasks[0], self.kind):
            self.overtaken = True
            evaluate(self.order)
        yield from super().map(tasks)


@pytest.mark.parametrize("kind", [UnitTask, SummaryTask])
def test_two_evaluations_of_one_question_answer_it_once(sets: tuple[str, str], tmp_path: Path, kind: type) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=16, sampling=SETTINGS, out=out)
    found = evaluate(order, Overtaken(order, kind))
    assert result.results(out) == [json.loads(json.dumps(found))]
    assert storage.list_objects(f"{out}/unkept") == {}


@pytest.mark.parametrize("left", ["refused", "no manifest", "damaged manifest"])
def test_images_that_cannot_be_gone_on_with_are_drawn_anew(sets: tuple[str, str], tmp_path: Path, left: str) -> None:
    """An evaluation was killed, and its images are of other hardware, or lost their manifest."""
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=16, sampling=SETTINGS, out=out)
    with pytest.raises(KeyboardInterrupt):
        evaluate(order, Broken())
    folder = f"{out}/unkept/{storage.list_names(f'{out}/unkept')[0]}"
    manifest = json.loads(storage.read(f"{folder}/manifest.json"))
    manifest["fingerprint"]["device"] = "cuda NVIDIA SPARC"
    if left == "no manifest":
        storage.delete(f"{folder}/manifest.json")
    else:
        text = json.dumps(manifest) if left == "refused" else "{"
        storage.publish(f"{folder}/manifest.json", text.encode())
    storage.delete(f"{folder}/receipts/000000008-000000016.json")
    assert evaluate(order)["num_samples"] == 16
    assert storage.list_objects(f"{out}/unkept") == {}


@pytest.mark.parametrize(("metric", "best"), [("frechet_pixel", 10), ("precision_pixel", 20), ("is_inception", 20)])
def test_the_best_is_the_smallest_distance_or_the_largest_precision(metric: str, best: int) -> None:
    rated = [{"step": s, "metrics": {metric: v}} for s, v in ((10, 0.25), (20, 0.75), (30, 0.5), (40, 0.25))]
    assert ranking.best_of(rated, metric)["step"] == best


def test_follows_at_the_wanted_interval(sets: tuple[str, str], tmp_path: Path) -> None:
    run = f"file://{tmp_path}/run"
    for step in (8, 16, 20, 30):
        publish_snapshot(run, step)
    cfg = run_config(run, sets[1])
    question = following.question_of(cfg, Order(data=sets[1], metrics=PIXEL, num_samples=16))
    assert following.pending_steps(run_config(run, sets[1], every=8), question) == [8, 16, 30]
    assert following.pending_steps(cfg, question) == [8, 16, 20, 30]


def test_on_ray_with_the_store(ray_cluster: RayCluster, bucket_url: str) -> None:
    """The same result from two actors and a bucket as from one process and files."""
    url = make_snapshot(f"{bucket_url}/snapshot")
    data = make_set(f"{bucket_url}/data", pictures(201, 2))
    order = Order(
        snapshot=url, data=data, metrics=("frechet_pixel", "frechet_lite0"), num_samples=24, out=f"{bucket_url}/e"
    )
    order = replace(order, sampling=SETTINGS)
    found = job.run(order, (1, 2), CLUSTER)
    assert found["metrics"] == pytest.approx(evaluate(replace(order, out=f"{bucket_url}/other"))["metrics"], rel=1e-5)
    assert set(found["metrics"]) == {f"frechet_{n}{f}" for n in ("pixel", "lite0") for f in ("", "_floor")}


def test_settings_that_cannot_work_end_a_job_on_ray(ray_cluster: RayCluster, tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    order = make_order(url, f"file://{tmp_path}/out", sampling=SETTINGS.model_copy(update={"steps": 99}))
    with pytest.raises(ConfigError, match=r"sampling\.steps: 99") as error:
        sampling_job.run([order], (1, 1), CLUSTER)
    assert isinstance(error.value, DdpmDistError)
    assert not (tmp_path / "out").exists()
