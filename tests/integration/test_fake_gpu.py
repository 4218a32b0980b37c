"""Recipes for CPUs on a machine that shows a GPU: they train, sample and evaluate on the CPU, with a CPU's bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_dist import storage
from tests.integration import jobs
from tests.integration.test_demo import check_results
from tools.local.s3_server import S3Server, client_environment

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests/fake_gpu"
STEPS = 40


def environment(**more: str) -> dict[str, str]:
    """Of a process that sees the GPU, and all that it starts."""
    mine = {n: v for n, v in os.environ.items() if n not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    return {**mine, "PYTHONPATH": f"{FAKE}{os.pathsep}{ROOT}", **more}


@pytest.mark.parametrize(("hidden", "expected"), [({}, "True 1 cuda"), ({"CUDA_VISIBLE_DEVICES": ""}, "False 0 None")])
def test_the_gpu_is_seen_and_whoever_uses_it_fails(hidden: dict[str, str], expected: str) -> None:
    """Or the tests below would prove nothing."""
    code = (
        "import torch\n"
        "print(torch.cuda.is_available(), torch.cuda.device_count(), torch.accelerator.current_accelerator())\n"
        "torch.zeros(1, device='cuda')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment(**hidden), capture_output=True, text=True)
    assert found.stdout.strip() == expected, found.stderr
    assert "AssertionError" in found.stderr


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_demonstration_beside_a_gpu_is_a_cpu_s(tmp_path: Path) -> None:
    """Training, sampling and evaluation as jobs on Ray, whose workers see the GPU; weights as of a run without one."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/local/demo.py"), "digits", "--steps", str(STEPS), "--out", str(out)]
    demo = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert demo.returncode == 0, demo.stdout[-4000:] + demo.stderr[-4000:]
    check_results(out, images=STEPS * 32)

    data, run, log = f"file://{tmp_path}/data", f"file://{tmp_path}/run", tmp_path / "log"
    jobs.make_digits(data)
    plain = [f"run.url={run}", f"data.url={data}", f"train.steps={STEPS}"]
    jobs.finish(jobs.deepspeed("configs/digits.yaml", plain, log), log)
    before = dict(os.environ)
    with S3Server(out / "s3") as server:
        os.environ.clear()
        os.environ.update(client_environment(server))
        storage.clear_instances()
        try:
            theirs = jobs.weights_sha256("s3://ddpm/runs/digits", STEPS)
        finally:
            os.environ.clear()
            os.environ.update(before)
            storage.clear_instances()
    assert theirs == jobs.weights_sha256(run, STEPS)
