"""Evaluations end to end: the numbers are those of one process with other people's code; what is wrong is said."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_dist import rng, snapshot, storage
from ddpm_dist.data.stream import iterate
from ddpm_dist.diffusion.likelihood import bits_per_dim
from ddpm_dist.diffusion.ode import log_likelihood
from ddpm_dist.errors import ConfigError, DdpmDistError, EvaluationError
from ddpm_dist.evaluation import job, ranking
from ddpm_dist.evaluation.distances import frechet_of_features, kid, prdc
from ddpm_dist.evaluation.moments import in_first_half
from ddpm_dist.evaluation.order import Order
from ddpm_dist.sampling import job as sampling_job
from tests.evaluation.tiny import (
    CLUSTER,
    PIXEL,
    InProcess,
    as_features,
    evaluate,
    make_set,
    pictures,
)
from tests.ray_local import RayCluster
from tests.sampling.tiny import SETTINGS, make_order, make_snapshot


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


@pytest.mark.parametrize(("metric", "best"), [("frechet_pixel", 10), ("precision_pixel", 20), ("is_inception", 20)])
def test_the_best_is_the_smallest_distance_or_the_largest_precision(metric: str, best: int) -> None:
    rated = [{"step": s, "metrics": {metric: v}} for s, v in ((10, 0.25), (20, 0.75), (30, 0.5), (40, 0.25))]
    assert ranking.best_of(rated, metric)["step"] == best


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
