"""A Ray cluster of the tests' own: its own ports and folder, nodes that can be killed as by a power cut."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_dist.cluster import METRICS_CLOSED
from tools.local.processes import start_family
from tools.local.s3_server import S3Server, free_port

ROOT = Path(__file__).resolve().parents[1]
START_S = 180.0

# One token for all clusters and clients of these tests: a file in the home directory may change under them.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)


class RayCluster:
    """A head with some logical CPUs; `add_node` and `kill_node` change its size."""

    def __init__(self, cpus: int, environment: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **environment,
            **METRICS_CLOSED,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",
        }
        self.address = f"127.0.0.1:{free_port()}"
        head = ["--head", "--include-dashboard=false", f"--port={self.address.split(':')[1]}"]
        self.head = self._start([*head, f"--temp-dir={self.folder}"], cpus)

    def add_node(self, cpus: int) -> "subprocess.Popen[bytes]":
        return self._start([f"--address={self.address}"], cpus)

    def kill_node(self, node: "subprocess.Popen[bytes]") -> None:
        """SIGKILL to all of a node's processes at once."""
        for process in _processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def announce_loss(self, seconds: int) -> None:
        """Tells Ray, as a cloud's notice of preemption does, that all nodes but the head are going away."""
        script = (
            "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); "
            "print(*[n['NodeID'] for n in ray.nodes() if 'node:__internal_head__' not in n['Resources']])"
        )
        environment = {**os.environ, **self.env}
        nodes = subprocess.run(
            [sys.executable, "-c", script, self.address], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        for node in nodes:
            command = [
                str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={self.address}",
                f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test",
                f"--deadline-remaining-seconds={seconds}",
            ]  # fmt: skip
            subprocess.run(command, env=environment, check=True, capture_output=True)

    def workers(self, name: str = "ray::_Host") -> list[psutil.Process]:
        """Actor processes of this cluster whose title begins with a name."""
        found = []
        for process in [process for node in self._nodes for process in _processes(node)]:
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                    found.append(process)
        return found

    def close(self) -> None:
        for node in self._nodes:
            self.kill_node(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, arguments: list[str], cpus: int) -> "subprocess.Popen[bytes]":
        command = [
            str(Path(sys.executable).with_name("ray")), "start", *arguments, "--block", f"--num-cpus={cpus}",
            f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", "--object-store-memory=200000000", "--min-worker-port=0",
            "--max-worker-port=0",
        ]  # fmt: skip
        folder = Path(tempfile.mkdtemp(prefix="node-", dir=self.folder))
        log = folder / "start.log"
        with log.open("w") as out:
            node = start_family(command, folder, env={**os.environ, **self.env}, stdout=out, stderr=out, cwd=ROOT)
        self._nodes.append(node)
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return node


@pytest.fixture(scope="session")
def ray_nodes(s3_server: S3Server) -> Iterator[RayCluster]:
    """A cluster with 4 logical CPUs whose nodes know the S3 server."""
    cluster = RayCluster(4, s3_server.env)
    yield cluster
    _disconnect()
    cluster.close()


@pytest.fixture
def ray_cluster(ray_nodes: RayCluster, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """The same, as this process's RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    return ray_nodes


def _disconnect() -> None:
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()


def _processes(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Of a node whose guardian lives, all but the guardian."""
    return psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
