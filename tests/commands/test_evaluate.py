"""`launch/evaluate.py` as a person types it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.commands import evaluate as command
from ddpm_dist.errors import ConfigError, EvaluationError
from ddpm_dist.evaluation.order import Order
from ddpm_dist.recipe import load_config
from tests.commands.test_sample import launch
from tests.evaluation.tiny import make_set, pictures, publish_snapshot
from tests.ray_local import ROOT, RayCluster
from tests.sampling.tiny import SETTINGS, make_snapshot


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    make_snapshot(f"file://{tmp_path}/run/snapshots/000000010")
    text = f"""
        run: {{url: "file://{tmp_path}/run"}}
        data: {{url: "file://{tmp_path}/data", image_size: 8, channels: 1}}
        model: {{channels: 8, channel_mult: [1, 2], attention_resolutions: [4], norm_groups: 4}}
        train: {{steps: 10, global_batch: 4}}
        sampling: {{sampler: ddim, steps: 4, unit_size: 8, batch_size: 4}}
        evaluation: {{num_samples: 24, metrics: [frechet_pixel]}}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def order(*arguments: str) -> Order:
    args = command.parser("").parse_args(arguments)
    return command.make_order(args, load_config(args.config, args.overrides))


def test_by_default_the_newest_snapshot_against_the_training_data(recipe: str, tmp_path: Path) -> None:
    found = order("--config", recipe)
    assert found == Order(
        snapshot=f"file://{tmp_path}/run/snapshots/000000010",
        data=f"file://{tmp_path}/data",
        metrics=("frechet_pixel",),
        num_samples=24,
        sampling=SETTINGS,
        out=f"file://{tmp_path}/run/evaluation",
        nearest=command.NEAREST,
    )


def test_all_words(recipe: str) -> None:
    found = order(
        "--config", recipe, "--samples", "memory://s", "--reference", "memory://r.npz", "--metrics", "fid,prdc",
        "--network", "inception=memory://w.pth#sha256=ab", "--num-samples", "7", "--out", "memory://o",
    )  # fmt: skip
    assert (found.samples, found.data, found.reference) == ("memory://s", None, "memory://r.npz")
    assert (found.metrics, found.num_samples, found.out) == (("fid", "prdc"), 7, "memory://o")
    assert found.networks == {"inception": "memory://w.pth#sha256=ab"}
    configured = order("--config", recipe, "evaluation.networks={inception: memory://w.pth, mine: memory://m.pt}")
    assert configured.networks == {"inception": "memory://w.pth", "mine": "memory://m.pt"}


def test_where_the_indexes_lie(recipe: str, tmp_path: Path) -> None:
    """By data.index for the sets of data.url, by words of their own for others."""
    set_, other = f"file://{tmp_path}/data", "memory://other"
    for configured in ("data.index=memory://i", f"data.index={{'{set_}': memory://i}}"):
        found = order("--config", recipe, "--held-out", set_, configured)
        assert (found.data_index, found.held_out_index) == ("memory://i", "memory://i")
        found = order("--config", recipe, "--data", other, "--held-out", other, configured)
        assert (found.data_index, found.held_out_index) == (None, None)
    words = ("--held-out", other, "--data-index", "memory://j", "--held-out-index", "memory://k")
    found = order("--config", recipe, *words, "data.index=memory://i")
    assert (found.data_index, found.held_out_index) == ("memory://j", "memory://k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid"], "give --samples URL or --snapshot URL, or --config FILE"),
        (["--follow", "memory://no-run"], "not the folder of a run, it has no config.yaml"),
        (["--report", "memory://no-run"], "not the folder of a run"),
        (
            ["--config", "RECIPE", "--network", "mine=memory://m.pt"],
            "--network mine: no metric uses it; they are frechet_pix",
        ),
        (["--config", "RECIPE", "--network", "pixel=memory://m.pt"], "pixel is built in, and takes no weights"),
        (["--config", "RECIPE", "--network", "inception"], "--network inception: expected NAME=URL"),
    ],
)
def test_words_that_mean_nothing(recipe: str, arguments: list[str], message: str) -> None:
    words = [recipe if word == "RECIPE" else word for word in arguments]
    with pytest.raises(EvaluationError, match=message):
        command.run(command.parser("").parse_args(words))


def test_a_followed_run_keeps_its_training(recipe: str, tmp_path: Path) -> None:
    storage.publish(f"file://{tmp_path}/run/config.yaml", Path(recipe).read_bytes())
    args = command.parser("").parse_args(["--follow", f"file://{tmp_path}/run", "train.steps=3"])
    with pytest.raises(ConfigError, match="the run's own configuration holds"):
        command.run(args)


def test_the_command_on_a_cluster_and_a_bucket(ray_cluster: RayCluster, bucket_url: str, recipe: str) -> None:
    """Evaluates the newest snapshot of a run, then writes the report; the last line is the result as JSON."""
    make_snapshot(f"{bucket_url}/run/snapshots/000000010")
    make_set(f"{bucket_url}/data", pictures(60, 2))
    storage.publish(f"{bucket_url}/run/config.yaml", Path(recipe).read_bytes())
    cluster = {**ray_cluster.env, "RAY_ADDRESS": ray_cluster.address}
    words = ["--config", recipe, f"run.url={bucket_url}/run", f"data.url={bucket_url}/data", "--workers", "1:2"]
    run = launch("evaluate", *words, **cluster)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert set(result["metrics"]) == {"frechet_pixel", "frechet_pixel_floor"}
    assert "real against real" in run.stdout
    assert storage.exists(f"{bucket_url}/run/evaluation/results/{result['name']}.json")
    report = launch("evaluate", "--report", f"{bucket_url}/run", **cluster)
    assert report.returncode == 0, report.stderr
    assert f"{result['metrics']['frechet_pixel']:.4g}".encode() in storage.read(
        f"{bucket_url}/run/evaluation/report.html"
    )


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_follower_that_is_killed_evaluates_each_snapshot_once(
    ray_cluster: RayCluster, bucket_url: str, recipe: str
) -> None:
    """SIGKILL in the middle of the second of three snapshots, the last of which comes later; then the same command."""
    run, data = f"{bucket_url}/run", make_set(f"{bucket_url}/data", pictures(60, 2))
    text = Path(recipe).read_text().replace("steps: 10,", "steps: 30,").replace("num_samples: 24", "num_samples: 96")
    storage.publish(f"{run}/config.yaml", text.encode())
    publish_snapshot(run, 10)
    publish_snapshot(run, 20)
    command = [sys.executable, "launch/evaluate.py", "--follow", run, "--data", data, "--workers", "1:2"]
    command += ["cluster.wait_seconds=240"]
    environment = {**os.environ, **ray_cluster.env, "RAY_ADDRESS": ray_cluster.address}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def results() -> list[str]:
        return storage.list_names(f"{run}/evaluation/results")

    def drawing() -> bool:
        return any("/receipts/" in name for name in storage.list_objects(f"{run}/evaluation/unkept"))

    follower = start()
    try:
        _until(lambda: len(results()) == 1 and drawing(), follower)
        follower.kill()
        follower.wait()
        assert len(results()) == 1, "the second evaluation was over before it could be killed; make it larger"
        first = storage.read(f"{run}/evaluation/results/{results()[0]}")
        publish_snapshot(run, 30)
        follower = start()
        assert follower.communicate(timeout=400)[0].startswith("2 snapshots evaluated")
    finally:
        follower.kill()
    assert [int(name[:9]) for name in results()] == [10, 20, 30]
    assert storage.read(f"{run}/evaluation/results/{results()[0]}") == first
    assert len([n for n in storage.list_objects(f"{run}/tensorboard/evaluation") if "tfevents" in n]) == 3
    assert not drawing()


def _until(true: Callable[[], bool], process: "subprocess.Popen[str]", patience_s: float = 400) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert process.poll() is None, "the follower ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
