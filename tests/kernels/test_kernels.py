"""Our kernels for GPUs, without one: by Triton's interpreter beside torch, and compiled for two kinds of GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton (pip install 'triton>=3.6': 640 MB)"
    ),
]


def run(*command: str, **environment: str) -> None:
    """In a process of its own: Triton settles on its interpreter when it is imported."""
    where = {"cwd": HERE.parents[1], "env": {**os.environ, **environment}}
    done = subprocess.run([sys.executable, *command], **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_they_compute_what_torch_does() -> None:
    """No launch on a device: addresses out of bounds, races and alignment are not seen."""
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted.py"), TRITON_INTERPRET="1")


def test_they_compile_for_gpus() -> None:
    """To machine code for A100 and H100, each kind of launch in bf16 and float32; it isn't run."""
    run(str(HERE / "compiled.py"))
