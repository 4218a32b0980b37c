"""Real training jobs for the integration tests: started, watched, killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm_dist import storage
from ddpm_dist.state.history import latest_step
from tools.local.processes import start_bound
from tools.local.s3_server import free_port

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.channels=32", "model.channel_mult=[1,2]", "model.num_res_blocks=1", "model.dropout=0.1",
    "train.global_batch=16", "train.max_micro_batch=4", "train.warmup_steps=5", "logging.every_steps=5",
    "logging.grid_images=0", "checkpoint.every_steps=4", "checkpoint.snapshot_every_steps=1000",
)  # fmt: skip
"""digits.yaml made small: two micro-batches a step with two workers, dropout, a state every 4 steps."""


def make_digits(url: str) -> None:
    subprocess.run([sys.executable, ROOT / "tools/make_shards.py", "digits", url], check=True, cwd=ROOT)


def deepspeed(config: str, overrides: Sequence[str], log: Path, workers: int = 2) -> subprocess.Popen[str]:
    """`deepspeed launch/train_deepspeed.py`, in a process group of its own."""
    command = [
        Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(workers), "--master_port", str(free_port()),
        ROOT / "launch/train_deepspeed.py", "--config", ROOT / config, *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with log.open("a") as out:
        return start_bound(
            [str(part) for part in command], cwd=ROOT, env={**environment, "PATH": path}, stdout=out, stderr=out,
            text=True, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], log: Path, patience_s: float = 240) -> None:
    """Waits for a good end; the log is shown otherwise."""
    try:
        code = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        code = None
    assert code == 0, f"exit code {code}\n{log.read_text()[-6000:]}"


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the job, as a power cut."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], log: Path, patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert process.poll() is None, f"the job ended too early\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"nothing came of it\n{log.read_text()[-6000:]}"
        time.sleep(0.05)


def state_reached(run_url: str, step: int) -> Callable[[], bool]:
    return lambda: (latest_step(run_url) or 0) >= step


def weights_sha256(run_url: str, step: int) -> str:
    url = storage.join(run_url, f"snapshots/{step:09d}/unet/diffusion_pytorch_model.safetensors")
    return hashlib.sha256(storage.read(url)).hexdigest()
