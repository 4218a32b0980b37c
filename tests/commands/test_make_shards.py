"""tools/make_shards.py as a command: kill-safe, deterministic, never overwriting."""

import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import storage
from ddpm_dist.commands import make_shards
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.index import load_index
from ddpm_dist.data.parts import PARTS_FOLDER
from ddpm_dist.data.planned import shuffled
from ddpm_dist.data.stream import iterate
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.errors import ConfigError, DataError
from tests.data.small_sets import config, global_batches, random_images
from tests.ray_local import RayCluster

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: object) -> None:
    make_shards.main([str(argument) for argument in arguments])


def tree(root: Path) -> dict[str, bytes]:
    """All objects; what a killed process was writing to isn't one (storage never lists it)."""
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and file.suffix != ".tmp"
    }


@pytest.fixture
def images(tmp_path: Path) -> np.ndarray:
    """60 images as an .npz, and as a folder."""
    found = random_images(60, 16)
    np.savez(tmp_path / "in.npz", images=found, labels=np.arange(60) % 5)
    (tmp_path / "files").mkdir()
    for i, image in enumerate(found):
        (tmp_path / "files" / f"{i:02d}.png").write_bytes(encode_png(image))
    return found


def test_every_item_once_shuffled_with_its_label(tmp_path: Path, images: np.ndarray) -> None:
    make("npz", tmp_path / "in.npz", f"file://{tmp_path}/out", "--shard-samples", 13)
    found = list(iterate(f"file://{tmp_path}/out"))
    numbers = [int(sample.key) for sample in found]
    assert sorted(numbers) == list(range(60))
    assert numbers != sorted(numbers)
    for sample, number in zip(found, numbers, strict=True):
        assert np.array_equal(sample.image.transpose(1, 2, 0), images[number])
        assert sample.label == number % 5
    assert [shard.samples for shard in load_index(f"file://{tmp_path}/out").shards] == [13, 13, 13, 13, 8]
    assert verify_shards(f"file://{tmp_path}/out") == []


def test_seed_and_no_shuffle(tmp_path: Path, images: np.ndarray) -> None:
    for name, arguments in {"a": [], "b": ["--seed", 1], "c": ["--no-shuffle"]}.items():
        make("npz", tmp_path / "in.npz", f"file://{tmp_path}/{name}", *arguments)
    keys = {name: [sample.key for sample in iterate(f"file://{tmp_path}/{name}")] for name in "abc"}
    assert keys["a"] != keys["b"]
    assert keys["c"] == sorted(keys["c"])


@pytest.mark.parametrize(
    ("arguments", "formats", "shape"),
    [
        ([], {"png": 60}, (3, 16, 16)),
        (["--format", "jpeg", "--quality", 80, "--size", 8], {"jpeg": 60}, (3, 8, 8)),
        (["--format", "raw", "--channels", 1], {"npy": 60}, (1, 16, 16)),
        (["--format", "keep"], {"png": 60}, (3, 16, 16)),
    ],
)
def test_forms(
    tmp_path: Path, images: np.ndarray, arguments: list[object], formats: dict[str, int], shape: tuple[int, ...]
) -> None:
    make("folder", tmp_path / "files", *arguments, f"file://{tmp_path}/out")
    assert dict(load_index(f"file://{tmp_path}/out").schema.formats) == formats
    sample = next(iterate(f"file://{tmp_path}/out"))
    assert sample.image.shape == shape
    if "keep" in arguments:
        assert np.array_equal(sample.image.transpose(1, 2, 0), images[int(sample.key.partition("_")[0])])


def test_shard_size_in_bytes(tmp_path: Path, images: np.ndarray) -> None:
    make("npz", tmp_path / "in.npz", f"file://{tmp_path}/out", "--shard-bytes", 12000, "--format", "raw")
    sizes = [shard.bytes for shard in load_index(f"file://{tmp_path}/out").shards]
    assert len(sizes) > 8
    assert max(sizes) <= 2 * 12000


def test_it_refuses_to_overwrite(tmp_path: Path, images: np.ndarray, bucket_url: str) -> None:
    make("npz", tmp_path / "in.npz", bucket_url)
    before = storage.list_objects(bucket_url)
    make("npz", tmp_path / "in.npz", bucket_url)  # the same again: it is complete
    with pytest.raises(ConfigError, match=r"holds another data set \(shuffle_seed: 0 there, 3 now\)"):
        make("npz", tmp_path / "in.npz", bucket_url, "--seed", 3)
    assert storage.list_objects(bucket_url) == before
    storage.publish(f"{bucket_url}-other/file", b"mine")
    with pytest.raises(ConfigError, match="not empty; nothing is overwritten"):
        make("npz", tmp_path / "in.npz", f"{bucket_url}-other")


def test_bad_images_are_named_or_left_out(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "files" / "17.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"17\.png: not an image: it begins with b'no image'.*--skip-bad"):
        make("folder", tmp_path / "files", f"file://{tmp_path}/a")
    make("folder", tmp_path / "files", f"file://{tmp_path}/b", "--skip-bad")
    assert load_index(f"file://{tmp_path}/b").num_samples == 59


def test_a_bad_image_half_way_is_no_dead_end(tmp_path: Path, images: np.ndarray) -> None:
    """With --skip-bad, or with a whole image in its place, the same folder is finished, as if it had been so before."""
    (tmp_path / "files" / "17.png").write_bytes(b"no image")
    for name in ("skipped", "mended", "removed"):
        with pytest.raises(DataError, match=r"17\.png"):
            make("folder", tmp_path / "files", f"file://{tmp_path}/{name}", "--shard-samples", 7)
        assert list((tmp_path / name / PARTS_FOLDER).iterdir()), "the bad image is in the first shard"
    make("folder", tmp_path / "files", f"file://{tmp_path}/skipped", "--shard-samples", 7, "--skip-bad")
    make("folder", tmp_path / "files", f"file://{tmp_path}/skip", "--shard-samples", 7, "--skip-bad")
    assert tree(tmp_path / "skipped") == tree(tmp_path / "skip")
    with pytest.raises(ConfigError, match=r"skip_bad: True there, False now.*choose another URL, or delete the folder"):
        make("folder", tmp_path / "files", f"file://{tmp_path}/skip", "--shard-samples", 7)

    (tmp_path / "files" / "17.png").unlink()
    with pytest.raises(ConfigError, match=r"samples: 60 there, 59 now.*choose another URL, or delete the folder"):
        make("folder", tmp_path / "files", f"file://{tmp_path}/removed", "--shard-samples", 7)
    (tmp_path / "files" / "17.png").write_bytes(encode_png(images[17]))
    for name in ("mended", "whole"):
        make("folder", tmp_path / "files", f"file://{tmp_path}/{name}", "--shard-samples", 7)
    assert tree(tmp_path / "mended") == tree(tmp_path / "whole")


def test_a_shard_of_bad_images_alone_is_empty(tmp_path: Path, images: np.ndarray) -> None:
    root = tmp_path / "sorted"
    for i, image in enumerate(images):
        (root / f"{i // 30}").mkdir(parents=True, exist_ok=True)
        (root / f"{i // 30}" / f"{i:02d}.png").write_bytes(encode_png(image) if i >= 10 else b"")
    make("folder", root, f"file://{tmp_path}/out", "--shard-samples", 10, "--skip-bad", "--no-shuffle")
    index = load_index(f"file://{tmp_path}/out")
    assert [shard.samples for shard in index.shards] == [0, 10, 10, 10, 10, 10]
    assert index.num_classes == 2
    assert [sample.key[:8] for sample in iterate(index.url)] == [f"{i:08d}" for i in range(10, 60)]
    assert verify_shards(index.url) == []
    keys = [key for keys, _, _ in global_batches(config(index.url, image_size=16), 1, 0, 2) for key in keys]
    assert len(set(keys)) == 48


def test_runs_stay_together_on_the_way_to_a_shard() -> None:
    for count, run in ((100, 7), (100, 1), (7, 7), (5, 9)):
        found = shuffled(np.arange(count), count, run, 3)
        assert sorted(found.tolist()) == list(range(count))
        jumps = (np.diff(found) != 1).sum()
        assert jumps <= -(-count // run) - 1 if run > 1 else jumps > 50


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    found = random_images(120, 16)
    np.savez(tmp_path / "in.npz", images=found, labels=np.arange(120) % 5)
    options = ["npz", str(tmp_path / "in.npz")]
    tail = ["--shard-samples", "3"]
    make(*options, f"file://{tmp_path}/unbroken", *tail)
    out = tmp_path / "killed"
    finished = out / PARTS_FOLDER
    arguments = [*options, f"file://{out}", *tail, "--workers", "1"]
    chance = random.Random(4)
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would take longer to start than to be killed
    for _ in range(10):
        before = len(list(finished.glob("*.json"))) if finished.exists() else 0
        process = fork.Process(target=make, args=arguments)
        process.start()
        wanted = before + chance.randint(1, 3)
        while process.is_alive() and (not finished.exists() or len(list(finished.glob("*.json"))) < wanted):
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
    make(*arguments)
    assert tree(out) == tree(tmp_path / "unbroken")


@pytest.mark.full
def test_a_pool_dies_with_its_parent(tmp_path: Path) -> None:
    found = random_images(3000, 64)
    np.savez(tmp_path / "in.npz", images=found)
    arguments = ["npz", tmp_path / "in.npz", f"file://{tmp_path}/out", "--shard-samples", "10", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.make_shards", *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "out" / PARTS_FOLDER).exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()  # the parent alone
    process.wait()
    time.sleep(0.5)
    before = tree(tmp_path / "out")
    time.sleep(4)
    assert tree(tmp_path / "out") == before
    assert "index.json" not in before


def test_processes_make_the_same_bytes(tmp_path: Path, images: np.ndarray) -> None:
    for workers in (1, 2):
        make("npz", tmp_path / "in.npz", f"file://{tmp_path}/{workers}", "--shard-samples", 20, "--workers", workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.full
def test_a_ray_job_makes_the_same_bytes(
    tmp_path: Path, images: np.ndarray, ray_cluster: RayCluster, bucket_url: str
) -> None:
    """Over the workers of a cluster, to the bucket."""
    arguments = ["folder", tmp_path / "files", "--shard-samples", 7]
    make(*arguments, f"{bucket_url}/alone")
    make(*arguments, "--ray", 2, f"{bucket_url}/ray")
    alone, ray = (storage.list_objects(f"{bucket_url}/{name}") for name in ("alone", "ray"))
    assert alone == ray
    for name in alone:
        assert storage.read(f"{bucket_url}/alone/{name}") == storage.read(f"{bucket_url}/ray/{name}")
