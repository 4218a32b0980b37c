"""A whole training on a GPU: started as a person starts it, killed, and gone on with."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import storage
from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.state.history import latest_step

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"cuda": 100, "cpu": 12}
"""So many that a kill comes in between: a GPU takes milliseconds for each."""
SETTINGS = (
    "model.channels=32", "model.channel_mult=[1,2]", "model.num_res_blocks=1", "model.dropout=0.1",
    "train.global_batch=16", "train.max_micro_batch=8", "train.warmup_steps=2",
    "logging.every_steps=4", "logging.grid_images=4", "logging.grid_steps=2", "checkpoint.every_steps=4",
    "checkpoint.snapshot_every_steps=50", "cluster.workers=1", "data.workers=2", "cluster.wait_seconds=0.1",
)  # fmt: skip


def make_set(url: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    images = [EncodedSample(f"{i:03d}", encode_png(image), "png") for i, image in enumerate(pixels)]
    write_index(url, [write_shard(url, "a.tar", images)])


def start(
    device: str, run: str, data: str, log: Path, *overrides: str, hidden: bool = False
) -> "subprocess.Popen[bytes]":
    gpus = "cluster.gpus_per_worker=1" if device == "cuda" else "cluster.gpus_per_worker=0"
    command = [sys.executable, str(ROOT / "launch/train_deepspeed.py"), "--config", str(ROOT / "configs/digits.yaml")]
    command += [f"run.url={run}", f"data.url={data}", gpus, f"train.steps={STEPS[device]}", *SETTINGS, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    if hidden:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)


def finish(process: "subprocess.Popen[bytes]", log: Path) -> None:
    assert process.wait() == 0, log.read_text()[-4000:]


def weights(run: str, device: str) -> str:
    place = f"snapshots/{STEPS[device]:09d}/unet/diffusion_pytorch_model.safetensors"
    return hashlib.sha256(storage.read(storage.join(run, place))).hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/data"
    make_set(url)
    return url


def test_a_killed_training_goes_on_bit_for_bit(device: str, data: str, tmp_path: Path) -> None:
    log, beside = tmp_path / "log", tmp_path / "unbroken.log"
    unbroken, broken = f"file://{tmp_path}/unbroken", f"file://{tmp_path}/broken"
    other = start(device, unbroken, data, beside)  # at once, as each takes long to import
    job = start(device, broken, data, log)
    while (latest_step(broken) or 0) < 4:
        assert job.poll() is None, log.read_text()[-4000:]
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    finish(start(device, broken, data, log), log)
    finish(other, beside)
    text = log.read_text()
    assert "continuing at step" in text
    assert "Traceback" not in text, text[-4000:]
    assert "not bit for bit" not in text
    assert weights(broken, device) == weights(unbroken, device)


def test_a_recipe_for_cpus_trains_beside_a_visible_gpu(device: str, data: str, tmp_path: Path) -> None:
    """gpus_per_worker: 0 gives the CPU's bits, with a GPU in sight and without."""
    runs = {name: f"file://{tmp_path}/run-{name}" for name in ("seen", "hidden")}
    jobs = {name: start("cpu", run, data, tmp_path / name, hidden=name == "hidden") for name, run in runs.items()}
    for name, job in jobs.items():
        finish(job, tmp_path / name)
    assert weights(runs["seen"], "cpu") == weights(runs["hidden"], "cpu")


def test_without_a_compiler_it_says_so(device: str, data: str, tmp_path: Path) -> None:
    log, nothing = tmp_path / "log", tmp_path / "nothing"
    nothing.mkdir()
    before = os.environ["PATH"]
    os.environ["PATH"] = str(nothing)
    try:
        job = start(device, f"file://{tmp_path}/run", data, log, "model.compile=true")
    finally:
        os.environ["PATH"] = before
    assert job.wait() != 0
    text = log.read_text()
    assert "model.compile: " in text
    assert "Traceback" not in text, text[-3000:]
    assert ("gcc" if device == "cuda" else "g++") in text
