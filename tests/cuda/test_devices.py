"""Which device, how exactly, and what is refused: on a machine where a GPU is really visible."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_dist import device as devices
from ddpm_dist.cluster.child import Request
from ddpm_dist.cluster.standby import find
from ddpm_dist.config import ClusterConfig
from ddpm_dist.engine.checks import check
from ddpm_dist.engine.world import World
from ddpm_dist.errors import ConfigError
from tests.cuda.ranks import Ranks, _start
from tests.engine import worker_group as group

ROOT = Path(__file__).resolve().parents[2]


def facts(world: World) -> dict[str, Any]:
    return {
        "device": str(world.device),
        "backend": world.backend,
        "name": devices.name(world.device),
        "numerics": devices.fingerprint(world.device),
        "visible": torch.cuda.is_available(),
        "here": str(torch.zeros(1, device=world.device).device),
        "accelerator": os.environ["DS_ACCELERATOR"],
    }


def test_the_configuration_decides_the_device(alone: Ranks, device: str) -> None:
    (found,) = alone(facts)
    assert found["accelerator"] == device
    if device == "cuda":
        assert (found["device"], found["here"], found["backend"]) == ("cuda:0", "cuda:0", "nccl")
        assert found["name"] == torch.cuda.get_device_name(0)
        numerics = found["numerics"]
        assert (numerics["cuda"], numerics["cudnn"]) == (torch.version.cuda, torch.backends.cudnn.version())
        assert (numerics["deterministic"], numerics["tf32"]) == (True, False)
        assert numerics["kernels"].startswith("triton"), "or our own kernels aren't tested here"
    else:
        assert (found["device"], found["backend"], found["numerics"]) == ("cpu", "gloo", {})


def train_a_step(world: World) -> tuple[dict[str, Any], float]:
    engine = group.build(world, group.config(stage=1, precision="bf16"))
    group.backward(engine, 0)
    return facts(world), engine.step(1e-3).grad_norm


def test_a_recipe_for_cpus_trains_on_the_cpu_beside_a_visible_gpu() -> None:
    beside = Ranks("cpu")
    try:
        ((found, norm),) = beside(train_a_step)
    finally:
        beside.close()
    assert (found["device"], found["backend"], found["visible"]) == ("cpu", "gloo", False)
    assert norm > 0


def refusals(world: World) -> list[str]:
    """Messages of what a process on this device is refused."""
    said = []
    for gpus in (0.5, 2):
        with pytest.raises(ConfigError) as error:
            devices.check_training(ClusterConfig(gpus_per_worker=gpus))
        said.append(str(error.value))
    path, os.environ["PATH"] = os.environ["PATH"], "/nowhere"
    try:
        with pytest.raises(ConfigError) as error:
            check(group.config(model={"compile": True}), world)
        said.append(str(error.value))
    finally:
        os.environ["PATH"] = path
    if world.device.type == "cuda":
        check(group.config(precision="fp16", cluster={"gpus_per_worker": 1}), world)
    return said


def test_what_can_not_be_done_is_refused_with_a_remedy(alone: Ranks, device: str) -> None:
    (said,) = alone(refusals)
    assert "NCCL takes no two processes on one GPU" in said[0]
    assert "more would lie idle" in said[1]
    assert ("gcc or clang (PATH) is not on this node" if device == "cuda" else "g++ is not on this node") in said[2]
    if device == "cuda":
        assert devices.why_no_triton() is None, "or model.compile can't be tested here"


def tf32_errors(world: World) -> dict[str, float]:
    """Relative errors of float32 arithmetic on the device, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    x, w = torch.randn(4, 64, 32, 32, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    exact = {"product": a.double() @ b.double(), "convolution": torch.conv2d(x.double(), w.double(), padding=1)}
    on = [one.to(world.device) for one in (a, b, x, w)]
    found = {"product": on[0] @ on[1], "convolution": torch.conv2d(on[2], on[3], padding=1)}
    return {name: float((found[name].cpu().double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_where_it_is_said(device: str, tf32: bool) -> None:
    ranks = Ranks(device, tf32=tf32)
    try:
        (errors,) = ranks(tf32_errors)
    finally:
        ranks.close()
    for name, error in errors.items():
        if tf32 and device == "cuda":
            assert error < 3e-3, f"{name}: 10 bits of mantissa"
            assert name == "convolution" or error > 5e-5, "cuDNN chooses; a product has no choice"
        else:
            assert error < 2e-5, name


def take_memory(world: World, share: float) -> tuple[int, bool]:
    """(bytes that this process may take; whether it can take 1.2 times its share of the memory)."""
    devices.set_up(world.device, ClusterConfig(gpus_per_worker=share))
    free, total = devices.free_bytes(world.device), torch.cuda.mem_get_info(world.device)[1]
    try:
        torch.empty(int(1.2 * share * total), dtype=torch.uint8, device=world.device)
    except torch.OutOfMemoryError:
        return free, False
    return free, True


def test_a_fraction_of_a_gpu_is_that_much_of_its_memory(device: str) -> None:
    if device == "cpu":
        return  # it has no memory of its own
    ranks = Ranks(device)
    try:
        ((free, took),) = ranks(take_memory, 0.25)
    finally:
        ranks.close()
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.2 * total < free <= 0.26 * total
    assert not took


def test_what_these_tests_lack_is_one_line(device: str) -> None:
    from tests.cuda.conftest import lacking

    assert lacking(device) is None
    if device == "cpu":
        assert "tests/cuda need a GPU" in str(lacking("cuda"))
        assert "\n" not in str(lacking("cuda"))


def test_deterministic_algorithms_reach_cublas(alone: Ranks, device: str) -> None:
    (found,) = alone(deterministic_facts)
    assert found == ((":4096:8", True) if device == "cuda" else (None, False))


def deterministic_facts(world: World) -> tuple[str | None, bool]:
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled()


def from_a_fork(payload: str, descriptors: Any) -> None:
    """A rank as Ray's supervisors start it: forked from a process that has imported everything."""
    world = _start(ClusterConfig.model_validate_json(payload))
    _, norm = train_a_step(world)
    print(f"{world.device} {norm > 0}", flush=True)


def test_a_process_that_is_forked_from_a_standby_computes_on_its_gpu(device: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    standby = find(tmp_path / "standby", "ddpm_dist.preload:everything", idle_s=1.0, environment=environment)
    payload = ClusterConfig(gpus_per_worker=int(device == "cuda"), wait_seconds=0.1).model_dump_json()
    request = Request(
        "tests.cuda.test_devices:from_a_fork", payload, environment, str(ROOT), "a rank", (str(ROOT), *sys.path)
    )
    out = tmp_path / "out"
    with out.open("wb") as file:
        child = standby.start(request, file.fileno(), file.fileno())
        code = child.wait(120)
    assert code == 0, out.read_text()
    assert f"{'cuda:0' if device == 'cuda' else 'cpu'} True" in out.read_text()


def test_the_folder_is_enough(tmp_path: Path) -> None:
    """Neither Ray nor S3's packages are imported by what trains, samples and evaluates at file://."""
    blocked = "ray", "s3fs", "aiobotocore", "botocore", "diffusers"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    code = (
        "from ddpm_dist import preload\n"
        "preload.everything()\n"
        "from ddpm_dist.training import entry\n"
        "from ddpm_dist.sampling.worker import SampleWorker\n"
        "from ddpm_dist.evaluation.worker import EvaluationWorker\n"
        "from ddpm_dist.commands import train_deepspeed\n"
        "import deepspeed, tools.bench.gpu\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
