"""Faults of one node, planted for real: small file systems, limits, names, ports, variables, absent programs."""

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from ddpm_dist.doctor import State, gpus, machine, network
from ddpm_dist.doctor.rows import Asked
from ddpm_dist.recipe import dump_config, load_config
from tests.doctor import faults
from tests.doctor.faults import failing


def asked(*overrides: str) -> Asked:
    urls = ["run.url=file:///nowhere/run", "data.url=file:///nowhere/data"]
    return Asked(dump_config(load_config("digits", [*urls, *overrides])))


def namespaces() -> bool:
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not namespaces(), reason="needs root and namespaces")
def test_ten_faults_at_once_each_by_its_name(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A container as they are: 64 MB of /dev/shm, a full disk, a name that nobody knows, low limits; and a recipe that
    doesn't fit it."""
    small, programs = Path(tempfile.mkdtemp(prefix="small-", dir="/tmp")), tmp_path / "none"  # a short path
    request.addfinalizer(small.rmdir)
    plant = f"""
        mount -t tmpfs -o size=64m none /dev/shm
        mount -t tmpfs -o size=16m none {small}
        mount -t tmpfs none /sys/class && mkdir -p /sys/class/infiniband/mlx5_0
        hostname nobody-knows-me
        ulimit -n 512 && ulimit -l 64
        export PATH={programs}
        exec "$@"
    """
    with socket.create_server(("", 0)) as taken:
        environment = {
            "TMPDIR": str(small),
            "GLOO_SOCKET_IFNAME": "ib9",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        words = [
            "--config", "digits", f"run.url={(tmp_path / 'run').as_uri()}", "data.url=file:///nowhere/data",
            "zero.offload_optimizer=true", "model.channels=1024", "train.global_batch=8192",
            "train.max_micro_batch=4096", "cluster.workers=2",
        ]  # fmt: skip
        shell = [shutil.which("unshare") or "", "--mount", "--uts", shutil.which("sh") or "", "-c", plant, "-"]
        code, rows, _ = faults.run(words, environment, shell)
    found = failing(rows)
    assert code == 1
    assert set(found) == {
        "shared memory", "disk", "locked memory", "open files", "host name", "interface", "port", "compilers", "room",
        "data",
    }  # fmt: skip
    assert found["shared memory"] == "/dev/shm has 64 MiB, 1.0 GiB are needed"
    assert found["host name"].startswith("nobody-knows-me resolves to nothing")
    assert "GLOO_SOCKET_IFNAME=ib9" in found["interface"]
    assert "InfiniBand (mlx5_0)" in found["locked memory"]
    assert "g++ and ninja is not on this node's PATH" in found["compilers"]
    assert not (tmp_path / "run").exists(), "nothing is left behind"
    assert not list(small.iterdir())


def test_a_temporary_folder_that_is_not_there_or_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert "TMPDIR" in failing([machine.temporary_folder.row(asked())])["temporary folder"]
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("RAY_TMPDIR", "/" + "long/" * 10)
    assert "at most 39 leave room" in failing([machine.temporary_folder.row(asked())])["temporary folder"]


def test_more_workers_than_cores_and_a_clock_that_nobody_keeps_are_remarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cpus", lambda: 1.0)
    assert machine.cpus.row(asked("cluster.workers=2")).state is State.REMARK
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda *_, **__: _Kernel(0x0040))
    assert machine.ntp.row(asked()).state is State.REMARK
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda *_, **__: _Kernel(0x2001))
    assert machine.ntp.row(asked()).state is State.OK


class _Kernel:
    """What the C library's adjtimex writes."""

    def __init__(self, status: int) -> None:
        self._status = status

    def adjtimex(self, buffer: object) -> int:
        buffer[40:44] = self._status.to_bytes(4, "little")  # type: ignore[index]
        return 0


def test_a_name_with_another_machines_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an /etc/hosts that was copied from another node says."""
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("192.0.2.77", 0))])
    assert "192.0.2.77, which no interface here has" in failing([network.host_name.row(asked())])["host name"]


# GPUs: nvidia-smi is a script, as there is none here

CARD = "0, NVIDIA H100 80GB HBM3, 580.95, 81559, {used}"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def answers(driver: Path, used: int, apps: str = "") -> None:
    lines = (
        f"case $1 in --query-gpu*) echo {shlex.quote(CARD.format(used=used))};; *) printf %s {shlex.quote(apps)};; esac"
    )
    driver.write_text(f"#!/bin/sh\n{lines}\n")
    driver.chmod(0o755)


def test_a_recipe_for_gpus_on_a_node_without() -> None:
    wanted = asked("cluster.gpus_per_worker=1")
    if shutil.which("nvidia-smi") is None:
        assert failing([gpus.gpus.row(wanted)])["GPUs"] == "none here, and cluster.gpus_per_worker is 1"
    assert gpus.gpus.row(asked()).state is State.SKIPPED


def test_a_torch_without_cuda_a_busy_gpu_and_a_driver_that_broke(driver: Path) -> None:
    wanted = asked("cluster.gpus_per_worker=1", "cluster.workers=1")
    answers(driver, used=4, apps="")
    assert "is a build for CPUs" in failing([gpus.gpus.row(wanted)])["GPUs"]
    assert gpus.neighbours.row(wanted).state is gpus.room.row(wanted).state is State.OK
    answers(driver, used=81000, apps="4711, 80990\n")
    assert failing([gpus.neighbours.row(wanted)]) == {"others on the GPUs": "1: process 4711 (80990 MiB)"}
    assert "559 MiB are free on a GPU" in failing([gpus.room.row(wanted)])["room"]
    driver.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    assert "version mismatch" in failing([gpus.gpus.row(wanted)])["GPUs"]
    assert gpus.room.row(wanted).remedy.startswith("reload the driver")


def test_a_look_that_breaks_is_a_remark_that_says_so(driver: Path) -> None:
    driver.write_text("#!/bin/sh\necho something else\n")
    driver.chmod(0o755)
    row = gpus.room.row(asked("cluster.gpus_per_worker=1", "cluster.workers=1"))
    assert (row.state, row.found) == (
        State.REMARK,
        "could not be looked at: ValueError: not enough values to unpack (expected 5, got 1)",
    )
