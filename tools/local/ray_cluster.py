"""A Ray cluster of one node on this machine, for the demo, the tests and the benchmarks; nothing of it stays behind."""

import atexit
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

from ddpm_dist.cluster import METRICS_CLOSED
from ddpm_dist.errors import ClusterError
from tools.local.processes import end, start_bound, start_family
from tools.local.s3_server import ROOT, free_port

READY_S = 120.0


class RayCluster:
    """`ray start --head` on loopback, with token authentication.

    Its token lives in a file that only this user reads, and its logs in a temporary folder with a short name (Ray's
    sockets have long ones). `env` is for clients. Start it in the main thread: it dies with that.

    programs: the folder of the `ray` and `python` to use, by default those of this process.
    """

    def __init__(self, cpus: int, environment: Mapping[str, str], programs: Path | None = None) -> None:
        self._programs = programs or Path(sys.executable).parent
        self._folder = Path(tempfile.mkdtemp(prefix="ddpm-ray-", dir="/tmp"))
        self._guardian: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self.cpus = cpus
        self.address = f"http://127.0.0.1:{free_port()}"
        token_file = self._folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
        mine = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
        self.env = {
            **mine,
            **METRICS_CLOSED,
            "PATH": f"{self._programs}{os.pathsep}{environment.get('PATH', os.defpath)}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_worker_niceness": "0",  # by default Ray gives its workers 15, less than anything else here
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._folder),  # what its processes leave there goes with it
        }
        atexit.register(self.stop)

    def start(self) -> "RayCluster":
        """Returns when jobs can be submitted; ClusterError with Ray's own words if that doesn't come."""
        output = self._folder / "ray_start.log"
        command = [str(self._programs / "ray"), "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--num-cpus={self.cpus}", "--num-gpus=0"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.address.rpartition(':')[2]}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        command += [f"--object-store-memory={256 * 2**20}", f"--temp-dir={self._folder}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # whatever is free, beside other clusters
        with open(output, "wb") as file:
            # In a session of its own, as a terminal's Ctrl-C is for its clients.
            self._guardian = start_family(
                command, self._folder, env=self.env, cwd=self._folder, stdout=file, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + READY_S
        while not self._takes_jobs():
            if self._guardian.poll() is not None or time.monotonic() > deadline:
                words = output.read_text(errors="replace")[-1500:].strip()
                self.stop()
                raise ClusterError(f"Ray didn't start within {READY_S:.0f} s on this machine; its last words:\n{words}")
            time.sleep(0.2)
        return self

    def submit(self, command: Sequence[str], show: Callable[[str], None], working_dir: Path | None = ROOT) -> None:
        """`ray job submit` of a command and waits for it; each line of output goes to `show`.

        working_dir: what Ray copies to the nodes; None where the command is installed on them. Raises ClusterError if
        the job fails. The job's processes end with the cluster.
        """
        copied = [] if working_dir is None else ["--working-dir", str(working_dir)]
        client = start_bound(
            [str(self._programs / "ray"), "job", "submit", *copied, "--", *command],
            env=self.env,
            cwd=working_dir or self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            assert client.stdout is not None
            for line in client.stdout:
                show(line.rstrip("\n"))
            if client.wait() != 0:
                raise ClusterError(f"the job failed: {' '.join(command)}")
        finally:
            end(client)

    def stop(self) -> None:
        """Ends every process of the cluster and removes its folder."""
        if os.getpid() != self._owner:
            return  # a fork of the process that started the cluster
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            self._guardian.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.stop)

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster, those of its jobs and workers included."""
        if self._guardian is None or self._guardian.poll() is not None:
            return []
        return psutil.Process(self._guardian.pid).children(recursive=True)

    def _takes_jobs(self) -> bool:
        token = (self._folder / "token").read_text()
        request = urllib.request.Request(  # noqa: S310 - our own http address
            f"{self.address}/api/version", headers={"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                return "ray_version" in json.loads(answer.read())
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def __enter__(self) -> "RayCluster":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def ignore_signals() -> None:
    """From here on neither Ctrl-C nor SIGTERM breaks off what is being cleaned up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
