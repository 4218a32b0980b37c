"""What runs on the hosts: the S3 server, a Ray cluster, jobs of both launchers, by the commands of docs/cluster.md."""

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.hosts.network import ROOT, Host, Network

PAGE = ROOT / "docs/cluster.md"
STORE = """
import json, signal, sys
from tools.local.s3_server import S3Server
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with S3Server(sys.argv[1], ip=sys.argv[2]) as server:
    print(json.dumps(server.env), flush=True)
    signal.sigwait([signal.SIGTERM])
"""
SMALLER = "--object-store-memory=200000000 --disable-usage-stats"


def documented(beginning: str, words: Mapping[str, str]) -> str:
    """The command of docs/cluster.md that begins so, with some of its words replaced: what is run is what stands there.

    The same command may stand there twice.
    """
    lines = PAGE.read_text().replace("\\\n", " ").splitlines()
    found = {" ".join(line.split()) for line in lines if line.startswith("    " + beginning)}
    assert len(found) == 1, f"{PAGE.name} has {len(found)} commands that begin with {beginning!r}"
    command = found.pop()
    for word, value in words.items():
        assert word in command, f"{PAGE.name}: {word!r} isn't in {command!r}"
        command = command.replace(word, value)
    return command


def start_store(host: Host) -> dict[str, str]:
    """SeaweedFS on a host; what its clients need in their environment."""
    log = host.disk / "store.log"
    with log.open("w") as output:
        host.start(f"exec python -c {shlex.quote(STORE)} $HOME/objects {host.address}", output)
    wait_until(lambda: log.read_text().endswith("}\n"), lambda: log.read_text())
    return dict(json.loads(log.read_text().splitlines()[-1]))


class Job:
    """A command on a host that runs for minutes; `text` is its output so far."""

    def __init__(self, host: Host, command: str, log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = host.start(command, output)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, true: Callable[[], bool], patience_s: float = 150) -> None:
        """Waits for something that has to come while the job lives."""

        def check() -> bool:
            there = true()
            assert there or self._process.poll() is None, f"the job ended too early\n{self._end()}"
            return there

        wait_until(check, self._end, patience_s)

    def finish(self, patience_s: float = 200) -> str:
        """Its whole output, after a good end."""
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"exit code {code}\n{self._end()}"
        return self.text

    def _end(self) -> str:
        return f"{self.log.name} ends with:\n{self.text[-6000:]}"


class RayHosts:
    """A Ray cluster with token authentication: a head without CPUs, nodes with one each, a client."""

    def __init__(self, network: Network, head: Host, nodes: Sequence[Host], client: Host) -> None:
        self.head, self.nodes, self.client = head, list(nodes), client
        self._folder = network.folder
        self._jobs = 0
        head.run(documented("mkdir -m 700 -p ~/.ray", {}))
        for host in (*nodes, client):
            head.run(documented("ssh NODE", {"NODE": host.name}))
        self.authentication = documented("export RAY_AUTH_MODE=token", {})
        health = documented("export RAY_health_check", {})
        self.closed = documented("export RAY_enable_metrics", {})
        start = documented("ray start --head", {"HEAD_IP": head.address})
        head.run(f"{self.authentication}; {health}; {self.closed}; {start} {SMALLER}", 120)
        for host in nodes:
            self.add(host)

    def add(self, host: Host) -> None:
        """Makes a node of a host that has just been booted."""
        start = documented("ray start --address", {"HEAD_IP": self.head.address, "NODE_IP": host.address})
        priority = documented("export RAY_worker_niceness", {})
        host.run(f"{self.authentication}; {self.closed}; {priority}; {start} --num-cpus=1 {SMALLER}", 120)

    @property
    def access(self) -> str:
        """The client's way to the cluster, as shell commands."""
        return f"{self.authentication}; {documented('export RAY_API_SERVER_ADDRESS', {'HEAD_IP': self.head.address})}"

    def submit(self, replaced: Mapping[str, str], overrides: Sequence[str], script: str = "train") -> Job:
        """`ray job submit` of a script of launch/, from the client."""
        self._jobs += 1
        command = documented(f"ray job submit --working-dir . -- python launch/{script}.py", replaced)
        return Job(
            self.client, f"{self.access}; {command} {shlex.join(overrides)}", self._folder / f"job-{self._jobs}.log"
        )


def wait_until(true: Callable[[], bool], tell: Callable[[], str], patience_s: float = 60) -> None:
    """Polls; `tell` says what is known if it never comes true."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"nothing came of it within {patience_s:.0f} s\n{tell()}"
        time.sleep(0.2)
