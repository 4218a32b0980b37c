"""run.init_from: fine-tuning from a snapshot, branching from a state, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_dist import snapshot
from tests.integration import jobs

STILL = "train.lr=1e-12"
"""So small a rate that the weights stay what they were at the start."""


def train(run_url: str, data_url: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "launch/train_deepspeed.py", "--config", "configs/digits.yaml", f"run.url={run_url}",
        f"data.url={data_url}", "cluster.workers=1", *jobs.SMALL, "train.steps=4", *overrides,
    ]  # fmt: skip
    return subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, timeout=200)


def weights(run_url: str, step: int) -> dict[str, torch.Tensor]:
    network, _ = snapshot.load_snapshot(f"{run_url}/snapshots/{step:09d}")
    return network.state_dict()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(URL of a short run, URL of its data)."""
    folder = tmp_path_factory.mktemp("origin")
    data_url, run_url = (folder / "data").as_uri(), (folder / "run").as_uri()
    jobs.make_digits(data_url)
    done = train(run_url, data_url, "ema.decay=0.5", "ema.warmup=false")
    assert done.returncode == 0, done.stderr
    return run_url, data_url


@pytest.mark.parametrize("what", ["snapshot", "run"])
def test_weights_are_taken_along(origin: tuple[str, str], tmp_path: Path, what: str) -> None:
    run_url, data_url = origin
    new = (tmp_path / "new").as_uri()
    url = run_url if what == "run" else f"{run_url}/snapshots/000000004"
    other = "diffusion.prediction=x_start"
    done = train(new, data_url, f"run.init_from={url}", STILL, "ema.decay=0.5", "ema.warmup=false", other)
    assert done.returncode == 0, done.stderr
    assert f"run.init_from: weights of {run_url}/{'checkpoints' if what == 'run' else 'snapshots'}" in done.stderr
    assert done.stderr.count(", this run trains x_start") == 1, "a change of objective is said, and allowed"
    assert "another noise schedule" not in done.stderr
    before, after = weights(run_url, 4), weights(new, 4)
    if what == "snapshot":
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    else:  # from a state, the average goes on towards the state's own weights: half-way at each step
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_is_no_origin_is_refused_before_anything_starts(origin: tuple[str, str], tmp_path: Path) -> None:
    _, data_url = origin
    new = (tmp_path / "new").as_uri()
    done = train(new, data_url, f"run.init_from={data_url}")
    assert done.returncode == 1
    assert "run.init_from" in done.stderr
    assert "neither a snapshot, nor a training state" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_network_is_refused_by_name(origin: tuple[str, str], tmp_path: Path) -> None:
    run_url, data_url = origin
    new = (tmp_path / "new").as_uri()
    url = f"{run_url}/snapshots/000000004"
    done = train(new, data_url, f"run.init_from={url}", "model.num_res_blocks=2")
    assert done.returncode == 1
    assert "is another one than model.* describes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_its_config_file_is_what_its_state_says(origin: tuple[str, str], tmp_path: Path) -> None:
    run_url, data_url = origin
    shutil.copytree(run_url.removeprefix("file://"), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    done = train((tmp_path / "run").as_uri(), data_url, "train.lr=0.5")
    assert done.returncode == 1
    assert "train.lr: 0.001 -> 0.5" in done.stderr
