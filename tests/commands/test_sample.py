"""`launch/sample.py` as a person types it: orders from words, and one message for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.commands import sample as command
from ddpm_dist.errors import ConfigError, DdpmDistError, SamplingError
from ddpm_dist.sampling.job import Order
from tests.ray_local import ROOT, RayCluster
from tests.sampling.tiny import SETTINGS, contents, make_snapshot


def orders(*arguments: str) -> list[Order]:
    args = command.parser("").parse_args(arguments)
    if args.config:
        cfg = command.load_config(args.config, args.overrides)
    else:
        cfg = command.stored_config(args.snapshot[0], args.overrides)
    return command.make_orders(args, cfg, args.snapshot or [command.newest(cfg)])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_snapshot(f"file://{tmp_path}/snapshots/000000010")


@pytest.fixture
def recipe(tmp_path: Path, url: str) -> str:
    text = f"""
        run: {{url: "file://{tmp_path}"}}
        data: {{url: "file://{tmp_path}/data", image_size: 8, channels: 1}}
        model: {{channels: 8, channel_mult: [1, 2], attention_resolutions: [4], norm_groups: 4}}
        train: {{steps: 10, global_batch: 4}}
        evaluation: {{num_samples: 1797}}
        cluster: {{workers: 2}}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def test_the_snapshot_tells_its_own_settings(url: str) -> None:
    assert orders("--snapshot", url, "--out", "memory://o", "--num-samples", "5") == [
        Order(url, "memory://o", 5, sampling=SETTINGS)
    ]
    changed = orders("--snapshot", url, "--out", "memory://o", "--seed", "3", "sampling.steps=2", "sampling.eta=1.0")
    assert changed[0].seed == 3
    assert changed[0].sampling == SETTINGS.model_copy(update={"steps": 2, "eta": 1.0})


def test_a_folder_of_diffusers_has_its_own_number_of_times(url: str, tmp_path: Path) -> None:
    """More than our default of 1,000 can be asked for if it has them, and no more than it has."""
    (tmp_path / "snapshots/000000010/ddpm_dist.json").unlink()
    scheduler = tmp_path / "snapshots/000000010/scheduler/scheduler_config.json"
    few = json.loads(scheduler.read_text())["num_train_timesteps"]
    with pytest.raises(ConfigError, match=rf"steps: {few + 1} can't be taken out of {few} "):
        orders("--snapshot", url, "--out", "memory://o", f"sampling.steps={few + 1}")
    more = {"num_train_timesteps": 4000, "trained_betas": None, "beta_start": 1e-5, "beta_end": 5e-3}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | more))
    assert orders("--snapshot", url, "--out", "memory://o", "sampling.steps=2000")[0].sampling.steps == 2000


def test_a_recipe_tells_snapshot_folder_and_number(recipe: str, tmp_path: Path) -> None:
    order = orders("--config", recipe)[0]
    assert order.snapshot == f"file://{tmp_path}/snapshots/000000010"
    assert order.out == f"file://{tmp_path}/samples/000000010-seed0"
    assert order.num_samples == 1797


def test_a_sweep_is_every_combination_snapshot_by_snapshot(url: str, tmp_path: Path) -> None:
    other = make_snapshot(f"file://{tmp_path}/snapshots/000000020", seed=1)
    sweep = ["--sweep", "sampling.steps=2,4", "--sweep", "sampling.eta=0,0.5"]
    swept = orders("--snapshot", url, "--snapshot", other, "--out", "memory://o", *sweep)
    assert [order.snapshot for order in swept] == [url] * 4 + [other] * 4
    assert [(order.sampling.steps, order.sampling.eta) for order in swept[:4]] == [
        (2, 0.0),
        (2, 0.5),
        (4, 0.0),
        (4, 0.5),
    ]
    assert len({order.out for order in swept}) == 8
    assert swept[5].out == "memory://o/000000020/steps=2-eta=0.5"


def test_a_sweep_over_lists(url: str) -> None:
    lists = ["--sweep", "sampling.guidance_interval=[0,5],[2, 19]", "--sweep", "sampling.eta=0,0.50"]
    swept = orders("--snapshot", url, "--out", "memory://o", *lists)
    assert [order.sampling.guidance_interval for order in swept] == [(0, 5)] * 2 + [(2, 19)] * 2
    assert swept[1].out == "memory://o/guidance_interval=0..5-eta=0.50"
    assert swept[2].out == "memory://o/guidance_interval=2..19-eta=0"


@pytest.mark.parametrize(("text", "expected"), [("4", (4, 4)), ("1:8", (1, 8)), (None, (2, 2))])
def test_workers(recipe: str, text: str | None, expected: tuple[int, int]) -> None:
    assert command.workers(text, command.load_config(recipe)) == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--num-samples", "3"], SamplingError, "give --snapshot URL, or --config FILE"),
        (["--snapshot", "SNAP"], SamplingError, "give --out URL"),
        (["--snapshot", "SNAP", "--out", "memory://o", "train.lr=1"], ConfigError, "only sampling"),
        (["--snapshot", "SNAP", "--out", "memory://o", "sampling.stepz=1"], ConfigError, "did you mean sampling.steps"),
        (
            ["--snapshot", "SNAP", "--out", "memory://o", "--sweep", "train.lr=1,2"],
            SamplingError,
            "--sweep train.lr=1,2",
        ),
        (
            ["--snapshot", "SNAP", "--out", "memory://o", "--workers", "3:1"],
            SamplingError,
            "--workers 3:1: expected N or",
        ),
        (["--snapshot", "SNAP", "--out", "memory://o", "--workers", "many"], SamplingError, "--workers many"),
    ],
)
def test_words_that_mean_nothing(url: str, arguments: list[str], kind: type[DdpmDistError], message: str) -> None:
    words = [url if word == "SNAP" else word for word in arguments]
    with pytest.raises(kind, match=message):
        command.run(command.parser("").parse_args(words))


def test_a_run_without_snapshots(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="has no snapshot yet; train it, or give --snapshot URL"):
        command.newest(command.load_config(recipe, [f"run.url=file://{tmp_path}/none"]))


def launch(script: str, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, f"launch/{script}.py", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_one_message_without_a_traceback(tmp_path: Path) -> None:
    run = launch("sample", "--snapshot", f"file://{tmp_path}/nothing", "--out", f"file://{tmp_path}/out")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"error: file://{tmp_path}/nothing: not a snapshot")


def test_prints_the_configuration(recipe: str) -> None:
    run = launch("sample", "--config", recipe, "--print-config", "sampling.steps=7")
    assert run.returncode == 0
    assert "  steps: 7\n" in run.stdout


def test_the_command_on_a_cluster_and_a_bucket(ray_cluster: RayCluster, bucket_url: str, tmp_path: Path) -> None:
    url = make_snapshot(f"{bucket_url}/snapshot", num_classes=2)
    run = launch(
        "sample", "--snapshot", url, "--out", f"{bucket_url}/out", "--num-samples", "20", "--workers", "1:2",
        "--npz", f"{bucket_url}/all.npz", **ray_cluster.env, RAY_ADDRESS=ray_cluster.address,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert (said["made"], said["duplicates"], said["grid"]) == (20, 0, f"{bucket_url}/out/grid.png")
    assert "sampling: 20 of 20 images" in run.stderr
    assert len(contents(f"{bucket_url}/out")) == 3 * 3 + 3
    assert storage.exists(f"{bucket_url}/all.npz")
    for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert os.environ[secret] not in run.stdout + run.stderr


def test_what_a_folder_of_diffusers_says_of_sampling_is_said(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "snapshots/000000010/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False, "timestep_spacing": "trailing"}))
    with caplog.at_level("INFO"):
        command.say_what_is_left(url)
    assert "not kept: its scheduler's clip_sample: False; how to sample belongs to a job" in caplog.text
    assert "timestep_spacing: trailing" in caplog.text
