"""The decision about the device, on machines that a faked `torch.cuda` describes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddpm_dist import device as devices
from ddpm_dist.config import ClusterConfig
from ddpm_dist.errors import ConfigError
from ddpm_dist.sampling.plan import Fingerprint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Set the first number to that of visible GPUs; the others are the devices that were chosen."""
    found = [2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found[0] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(torch.device(device).index))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    kept = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield found
    torch.set_num_threads(kept[0])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept[1:]
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def test_no_gpus_are_asked_for_and_none_is_taken(gpus: list[int]) -> None:
    cluster = ClusterConfig(cpus_per_worker=2)
    device = devices.select(cluster.gpus_per_worker, 1)
    devices.set_up(device, cluster)
    assert device == CPU
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "libraries that look for themselves find none"
    assert torch.get_num_threads() == 2
    assert gpus == [2], "no device was set"


@pytest.mark.parametrize(("there", "local_rank", "index"), [(2, 0, 0), (2, 1, 1), (1, 0, 0), (1, 3, 0)])
def test_a_gpu_by_the_rank_on_the_node(gpus: list[int], there: int, local_rank: int, index: int) -> None:
    gpus[0] = there
    device = devices.select(1, local_rank)
    assert device == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("there", "local_rank", "message"),
    [
        (0, 0, r"gpus_per_worker: 1, but process 0 on \S+ sees no GPU.*set cluster\.gpus_per_worker=0"),
        (2, 2, r"process 2 on \S+ sees 2 GPUs"),
    ],
)
def test_missing_gpus_are_said(gpus: list[int], there: int, local_rank: int, message: str) -> None:
    gpus[0] = there
    with pytest.raises(ConfigError, match=message):
        devices.select(1, local_rank)


@pytest.mark.parametrize("number", [0.5, 2, 1.5])
def test_training_takes_whole_gpus_one_by_one(number: float) -> None:
    with pytest.raises(ConfigError, match=rf"gpus_per_worker: {number:g}: a training process computes on one GPU"):
        devices.check_training(ClusterConfig(gpus_per_worker=number))
    for right in (0, 1):
        devices.check_training(ClusterConfig(gpus_per_worker=right))


def test_half_a_gpu_is_right_for_sampling_and_is_half_of_its_memory(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    device = devices.select(0.5)
    assert device == torch.device("cuda", 0)
    devices.set_up(device, ClusterConfig(gpus_per_worker=0.5))
    assert shares == [0.5], "two workers on a GPU don't count the same free memory"
    with pytest.raises(ConfigError, match=r"gpus_per_worker: 2: a process computes on one GPU"):
        devices.select(2)


@pytest.mark.parametrize("lets_go", [True, False])
def test_the_memory_of_a_killed_predecessor_is_waited_for(
    gpus: list[int], lets_go: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(1)
        return (79 if lets_go and len(asked) > 2 else 3) * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    caplog.set_level("INFO")
    devices.await_memory(torch.device("cuda", 1), patience_s=3600 if lets_go else 0.05)
    assert ("77.0 of 80.0 GiB of GPU 1 are taken, by a process that is ending" in caplog.text) or not lets_go
    assert ("are taken by others after" in caplog.text) == (not lets_go)
    assert len(asked) == 3 or not lets_go


def test_what_building_kernels_needs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in str(devices.why_no_triton())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "gcc or clang (PATH) is not on this node; install gcc" in str(devices.why_no_triton())
    monkeypatch.setenv("CC", "mycc")
    assert "mycc (CC in the environment)" in str(devices.why_no_triton())
    (tmp_path / "mycc").write_text("#!/bin/sh\n")
    (tmp_path / "mycc").chmod(0o755)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is not on this node; install python3-dev" in str(devices.why_no_triton())
    (tmp_path / "Python.h").write_text("")
    assert devices.why_no_triton() is None


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tf32", [True, False])
def test_how_exactly_a_gpu_computes(gpus: list[int], deterministic: bool, tf32: bool) -> None:
    cluster = ClusterConfig(gpus_per_worker=1, deterministic=deterministic, tf32=tf32)
    devices.set_up(torch.device("cuda", 1), cluster)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert gpus[1:] == [1]
    found = devices.fingerprint(torch.device("cuda", 1))
    assert (found["deterministic"], found["tf32"]) == (deterministic, tf32)
    assert devices.fingerprint(CPU) == {}, "states and manifests of a CPU are what they were"


def test_workers_are_alike_by_what_is_known_of_both() -> None:
    numerics = {"cuda": "13.0", "cudnn": 91002, "deterministic": True, "tf32": False}
    here = Fingerprint(device="cuda H100", threads=1, torch="2.13", numerics=numerics)
    assert here.alike(here)
    assert here.alike(here.model_copy(update={"numerics": None})), "a manifest of 0.1.0 doesn't say"
    assert not here.alike(here.model_copy(update={"numerics": {**numerics, "tf32": True}}))
    assert not here.alike(here.model_copy(update={"torch": "2.12", "numerics": None}))
    cpu = Fingerprint(device="cpu", threads=1, torch="2.13")
    assert "numerics" not in cpu.model_dump(mode="json"), "manifests of a CPU are what they were"


def test_nothing_else_asks_for_cuda() -> None:
    asking = re.compile(
        r"cuda\.(is_available|device_count|set_device|is_initialized|current_device|get_device_name|is_bf16_supported)"
        r"|torch\.accelerator|allow_tf32|cudnn\.|DS_ACCELERATOR"
    )
    found = {}
    for path in sorted((ROOT / "ddpm_dist").rglob("*.py")):
        asked = asking.search(path.read_text())
        if asked is not None:
            found[str(path.relative_to(ROOT / "ddpm_dist"))] = asked[0]
    # The doctor's asks in a process of its own, whose words it shows; Ray's driver sets it before a rank imports torch.
    assert {"device.py", "doctor/gpus.py", "cluster/train.py"} >= set(found), found
    assert found["cluster/train.py"] == "DS_ACCELERATOR"
