"""The tests that need a GPU run on the CPU first: `make test-cuda` is not to fail for what has no need of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cuda_tests(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/cuda", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=2400
    )


def test_without_a_gpu_it_says_so_in_a_line() -> None:
    done = cuda_tests()
    assert done.returncode == 1
    said = (done.stdout + done.stderr).strip()
    assert len(said.splitlines()) == 1, said
    assert "tests/cuda need a GPU" in said


@pytest.mark.full
@pytest.mark.timeout(2500)
def test_they_pass_on_a_cpu_as_far_as_it_goes() -> None:
    done = cuda_tests("--device", "cpu", "-k", "not compiled")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout, done.stdout[-2000:]
