"""What samples are compared with: our statistics, those of other programs, networks of others; and what is refused."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist import rng, storage
from ddpm_dist.commands import make_shards
from ddpm_dist.data.stream import iterate
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation.distances import frechet_of_features
from ddpm_dist.evaluation.given import load_given
from ddpm_dist.evaluation.order import Order
from tests.evaluation.tiny import (
    PIXEL,
    InProcess,
    as_features,
    evaluate,
    make_set,
    pictures,
    save_npz,
    script_network,
)


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
