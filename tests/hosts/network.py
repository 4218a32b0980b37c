"""Hosts on one machine, made of Linux namespaces: own address, interface, name, processes, ssh daemon, /tmp and home.

    with Network(("head", "worker-a")) as network:
        head = network.hosts["head"]
        head.run("hostname -I")
        head.cut(); head.heal(); head.power_cut(); head.boot()

Root only. Nothing of this has a name in the machine's own namespaces, but for one veth whose other end is in the
switch, and a folder in /tmp. All processes die with the one that made the network, however that dies, and the
kernel takes namespaces, bridge and links with them; the folder goes at the end, or when the next network is made.
"""

import fcntl
import ipaddress
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from tools.local.processes import start_bound

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("ip", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "sshd", "pdsh")
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
POOL = ipaddress.ip_network("198.18.0.0/15")
"""RFC 2544: for tests of networks, routed nowhere."""
INTERFACES = ("lan0", "eth0", "ens5", "enp1s0", "bond7")
"""The network interface of the first host, the second, and so on: machines of a cluster needn't agree."""
FOLDERS = "ddpm-hosts-"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_S = 30.0


def missing() -> list[str]:
    """What this machine lacks to make hosts, in words; empty if nothing."""
    if not sys.platform.startswith("linux"):
        return ["Linux"]
    if os.geteuid() != 0:
        return ["root"]
    found = [f"the program {name}" for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if found:
        return [*found, "(Debian: apt-get install iproute2 openssh-client openssh-server pdsh)"]
    veth = "ip link add name here type veth peer name there"
    tried = subprocess.run([*UNSHARE, *veth.split()], text=True, capture_output=True)
    return [f"a kernel that gives root namespaces and veth pairs ({tried.stderr.strip()})"] if tried.returncode else []


class Network:
    """A switch, and hosts with the addresses .2, .3 … behind it; this process has .1. They know each other by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._alone: int | None = _lock(Path("/tmp"))  # until the subnet is seen to be taken
        _collect_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDERS, dir="/tmp"))
        self._lock = _lock(self.folder)
        self._link = f"ddpm-{uuid.uuid4().hex[:8]}"
        addresses = _free_subnet().hosts()
        self._own_address = next(addresses)
        self.hosts = {name: Host(self, name, str(address), INTERFACES[index])
                      for index, (name, address) in enumerate(zip(names, addresses, strict=False))}  # fmt: skip
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Network":
        try:
            self._start_switch()
            self._let_others()
            self._make_keys()
            for host in self.hosts.values():
                host.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing of the network is left afterwards."""
        for host in self.hosts.values():
            host.power_cut()
        if self._switch is not None:
            subprocess.run(["ip", "link", "del", self._link], stderr=subprocess.DEVNULL)
            self._switch.kill()
            self._switch.wait()
        shutil.rmtree(self.folder)
        os.close(self._lock)
        self._let_others()

    def on_switch(self, command: str) -> None:
        assert self._switch is not None
        _check(["nsenter", f"--target={self._switch.pid}", "--net", *command.split()])

    def plug_in(self, pid: int, interface: str, port: str, address: str) -> None:
        """A cable from the switch's port to a new interface of the process's network namespace."""
        assert self._switch is not None
        inside = ["nsenter", f"--target={pid}", "--net", "ip"]
        mac = ":".join(f"{byte:02x}" for byte in (2, 0, *ipaddress.ip_address(address).packed))  # same at each boot
        veth = f"address {mac} type veth peer name {port} netns {self._switch.pid}"
        _check([*inside, *f"link add name {interface} {veth}".split()])
        self.on_switch(f"ip link set {port} master switch up")
        _check([*inside, *f"address add {address}/24 dev {interface}".split()])
        _check([*inside, *f"link set {interface} up".split()])

    def _start_switch(self) -> None:
        """A bridge in a namespace of its own, where no firewall of this machine sees what passes."""
        self._switch = start_bound(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        own = os.readlink("/proc/self/ns/net")
        _wait(lambda: os.readlink(f"/proc/{self._switch.pid}/ns/net") != own, "the switch")  # type: ignore[union-attr]
        self.on_switch("ip link add switch type bridge stp_state 0 forward_delay 0")
        self.on_switch("ip link set switch up")
        self.plug_in(os.getpid(), self._link, "uplink", str(self._own_address))

    def _let_others(self) -> None:
        if self._alone is not None:
            os.close(self._alone)
            self._alone = None

    def _make_keys(self) -> None:
        """One key for all users and one for all hosts; only ever in this network's folder."""
        for name in ("user", "host"):
            _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)])


class Host:
    """One machine. `disk` keeps its files over a power cut: `disk/home` is its root's home, `disk/tmp` its /tmp."""

    def __init__(self, network: Network, name: str, address: str, interface: str) -> None:
        self.name, self.address, self.interface = name, address, interface
        self.env: dict[str, str] = {}
        """Of all its processes, but for those that ssh starts."""
        self.disk = network.folder / name
        self.home = self.disk / "home"
        self._network = network
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._namespace = ""

    def boot(self) -> None:
        """Power on. Its files are what they were; nothing runs but the ssh daemon."""
        assert self._init is None, f"{self.name} is running"
        if not self.disk.exists():
            self._install()
        keep = {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
        program = [sys.executable, "-S", "-E", Path(__file__).with_name("host_init.py"), self.name, self.disk, *keep]
        command = [*UNSHARE, *map(str, program)]
        self._init = start_bound(command, stdout=subprocess.PIPE, start_new_session=True)  # a Ctrl-C is for the tests
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == b"ready\n", f"{self.name} doesn't boot"
        (self._pid,) = (child.pid for child in psutil.Process(self._init.pid).children())
        self._namespace = os.readlink(f"/proc/{self._pid}/ns/net")
        self.run("ip link set lo up")
        self._network.plug_in(self._pid, self.interface, self._port, self.address)
        self.run("/usr/sbin/sshd -f $HOME/.sshd_config")

    def start(self, command: str, output: IO[str] | int | None = None) -> "subprocess.Popen[str]":
        """A shell command as root, in the repository's folder; kill() ends its shell, a power cut everything."""
        enter = ["nsenter", f"--target={self._pid}", "--net", "--uts", "--mount", "--pid", f"--wdns={ROOT}"]
        assert self._init is not None, f"{self.name} has no power"
        return start_bound(
            [*enter, "bash", "-c", command], env=self._environment(), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT if output is not None else None, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, patience_s: float = 60.0) -> str:
        """Output of a shell command that has to succeed."""
        code, output = self.attempt(command, patience_s)
        assert code == 0, f"{self.name}: {command}: exit code {code}\n{output}"
        return output

    def attempt(self, command: str, patience_s: float = 60.0) -> tuple[int, str]:
        """(exit code, output) of a shell command."""
        with tempfile.TemporaryFile("w+", dir=self.disk) as output:  # not a pipe: daemons would hold it open
            process = self.start(command, output)
            code = process.wait(patience_s)
            output.seek(0)
            return code, output.read()

    def cut(self) -> None:
        """The cable is out; what runs goes on."""
        self._network.on_switch(f"ip link set {self._port} down")

    def heal(self) -> None:
        self._network.on_switch(f"ip link set {self._port} up")

    def power_cut(self) -> None:
        """SIGKILL to all processes at once. No peer hears of it: the link goes first, as with a real power cut."""
        if self._init is None:
            return
        if self._pid:
            unplug = ["nsenter", f"--target={self._pid}", "--net", "ip", "link", "del", self.interface]
            subprocess.run(unplug, stderr=subprocess.DEVNULL)
        self._init.kill()  # unshare, which takes process 1 along, and that its whole namespace
        self._init.communicate()
        _wait(lambda: not self.programs(), f"the end of {self.name}")
        self._init, self._pid = None, 0

    def programs(self) -> list[str]:
        """Names of the programs that run on it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/net") == self._namespace:
                    found.append((entry / "comm").read_text().strip())
            except OSError:
                continue  # gone
        return found

    def write(self, name: str, text: str) -> None:
        """A file of its home, readable by its root alone."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.write_text(text)

    @property
    def _port(self) -> str:
        return f"to-{self.name}"

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
        return {"HOME": "/run/home", "PATH": path, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", **self.env}

    def _install(self) -> None:
        etc = self.disk / "etc"
        for folder in (etc, self.home, self.disk / "tmp"):
            folder.mkdir(mode=0o700, parents=True)
        self.disk.chmod(0o755)
        etc.chmod(0o755)
        (self.disk / "tmp").chmod(0o1777)
        # As Debian's installer has it: a host's own name is loopback to itself, which no peer can reach.
        others = "".join(f"{host.address} {host.name}\n" for host in self._network.hosts.values() if host is not self)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}")
        (etc / "hostname").write_text(f"{self.name}\n")
        users = Path("/etc/passwd").read_text().splitlines()
        own = [line for line in users if not line.startswith("root:")]
        (etc / "passwd").write_text("\n".join(["root:x:0:0:root:/run/home:/bin/bash", *own, ""]))
        (etc / "shadow").write_text("root:*:20000:0:99999:7:::\n")  # not locked, and no password
        (etc / "shadow").chmod(0o600)
        self._install_ssh()

    def _install_ssh(self) -> None:
        user, host = ((self._network.folder / name).read_text() for name in ("user", "host"))
        host_public = (self._network.folder / "host.pub").read_text()
        self.write(".ssh/id_ed25519", user)
        self.write(".ssh/authorized_keys", (self._network.folder / "user.pub").read_text())
        known = (f"{other.name},{other.address} {host_public}" for other in self._network.hosts.values())
        self.write(".ssh/known_hosts", "".join(known))
        self.write(".ssh_host_key", host)
        self.write(
            ".sshd_config",
            f"ListenAddress {self.address}\nHostKey /run/home/.ssh_host_key\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel ERROR\n"
            "Subsystem sftp internal-sftp\n",
        )


def _free_subnet() -> ipaddress.IPv4Network:
    """A /24 of the pool that no interface of this machine has."""
    taken = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    for subnet in POOL.subnets(new_prefix=24):
        own = str(next(subnet.hosts()))
        if own not in taken:
            return subnet
    raise AssertionError(f"all of {POOL} is in use")


def _collect_leftovers() -> None:
    """Folders of networks whose process was killed; its hosts died with it."""
    for folder in Path("/tmp").glob(f"{FOLDERS}*"):
        try:
            lock = _lock(folder, fcntl.LOCK_NB)
        except OSError:
            continue  # in use, or gone
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path, how: int = 0) -> int:
    """A handle that keeps a folder locked until it is closed, or its process has ended."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
    except OSError:
        os.close(handle)
        raise
    return handle


def _check(command: Sequence[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr.strip()}"


def _wait(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not true():
        assert time.monotonic() < deadline, f"{what} takes more than {READY_S:.0f} s"
        time.sleep(0.02)
