"""run.init_from: fine-tuning from a snapshot, branching from a state, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_dist import snapshot
from ddpm_dist.commands import posthoc_ema
from ddpm_dist.errors import ConfigError
from ddpm_dist.training.branch import resolve
from ddpm_dist.training.ema import power_exponent, power_label
from tests.integration import jobs, loop_ranks as loop

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
    other = ("diffusion.prediction=x_start", "run.init_changes=[diffusion.prediction]")
    done = train(new, data_url, f"run.init_from={url}", STILL, "ema.decay=0.5", "ema.warmup=false", *other)
    assert done.returncode == 0, done.stderr
    assert f"run.init_from: weights of {run_url}/{'checkpoints' if what == 'run' else 'snapshots'}" in done.stderr
    said = done.stderr.count("diffusion.prediction: v there, x_start here")
    assert said == 1, "a change of objective that is meant is said, and allowed"
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
    assert "model.num_res_blocks: 1 there, 2 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_branch_goes_on_with_the_averages_clock(tmp_path: Path) -> None:
    """With warm-up the first decay is 0.1, and a power average's is 0: in a branch, they are those of its age."""
    data_url, urls = (tmp_path / "data").as_uri(), [(tmp_path / name).as_uri() for name in ("a", "b", "c")]
    jobs.make_digits(data_url)
    settings = ("ema.decay=0.999", "ema.warmup=true", "ema.power=[0.1]", "checkpoint.snapshot_every_steps=4")
    loop.finish(loop.config(urls[0], data_url, *settings, "train.steps=6"), 1)
    branch = loop.config(urls[1], data_url, *settings, STILL, f"run.init_from={urls[0]}", "train.steps=1")
    loop.finish(branch, 2)
    _, before = loop.newest_state(urls[0])
    manifest, after = loop.newest_state(urls[1])
    # The weights stay; each average goes on by 1 - decay of its 7th step towards them.
    decays = {"ema": (1 + 6) / (10 + 6), power_label(0.1): (1 - 1 / 7) ** (power_exponent(0.1) + 1)}
    for (kind, name), value in after.items():
        if kind in decays:
            expected = torch.lerp(before[kind, name], before["weights", name], 1 - decays[kind])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
    assert manifest.meta["ema_clock"] == 6
    # ... and so it is after a resume, in a branch of the branch, and in the snapshots.
    loop.finish(branch.model_copy(update={"train": branch.train.model_copy(update={"steps": 3})}), 1)
    assert loop.newest_state(urls[1])[0].meta["ema_clock"] == 6
    again = loop.config(urls[2], data_url, *settings, STILL, f"run.init_from={urls[1]}", "train.steps=1")
    loop.finish(again, 1)
    assert loop.newest_state(urls[2])[0].meta["ema_clock"] == 9
    info = snapshot.load_info(f"{urls[1]}/averages/power-0.100/000000003")
    assert (info["step"], info["ema_steps"]) == (3, 9)
    posthoc_ema.main([urls[1], "0.1", f"file://{tmp_path}/out"])
    one, stored = (snapshot.load_snapshot(url)[0].state_dict() for url in
                   (f"file://{tmp_path}/out", f"{urls[1]}/averages/power-0.100/000000003"))  # fmt: skip
    assert all(torch.equal(value, stored[name]) for name, value in one.items())
    assert snapshot.load_info(f"file://{tmp_path}/out")["step"] == 3
    other = loop.config(tmp_path.as_uri() + "/d", data_url, "ema.power=[0.05]", f"run.init_from={urls[0]}",
                        "train.steps=1")  # fmt: skip
    with pytest.raises(ConfigError, match=r"ema\.power: \[0\.05\]: .* keeps .* \[0\.100\], not of \[0\.05\]"):
        resolve(other)
    _another_task_takes_the_average(urls[0], f"{tmp_path.as_uri()}/e", data_url)


def _another_task_takes_the_average(origin: str, new: str, data_url: str) -> None:
    """Unconditional to conditional and a learned variance, trained for a step."""
    task = ("model.num_classes=10", "diffusion.variance=learned_range", "diffusion.loss=hybrid")
    loop.finish(resolve(loop.config(new, data_url, f"run.init_from={origin}", STILL, *task, "train.steps=1")), 1)
    (theirs, _), (ours, _) = (snapshot.load_snapshot(url) for url in
                              (f"{origin}/snapshots/000000006", f"{new}/snapshots/000000001"))  # fmt: skip
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    out = ours(x, t, torch.tensor([1, 10]))
    torch.testing.assert_close(out[:, :1], theirs(x, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, 1:], torch.ones(2, 1, 8, 8), rtol=0, atol=1e-5)


def test_a_run_without_its_config_file_is_what_its_state_says(origin: tuple[str, str], tmp_path: Path) -> None:
    run_url, data_url = origin
    shutil.copytree(run_url.removeprefix("file://"), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    done = train((tmp_path / "run").as_uri(), data_url, "train.lr=0.5")
    assert done.returncode == 1
    assert "train.lr: 0.001 -> 0.5" in done.stderr
