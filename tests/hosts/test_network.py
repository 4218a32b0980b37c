"""The hosts are what the other tests take them for: apart, reachable, silent when dead, and gone without a trace."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts.cluster import wait_until
from tests.hosts.conftest import need_hosts
from tests.hosts.network import ROOT, Network

pytestmark = pytest.mark.hosts
KNOCK = "timeout 3 bash -c 'echo > /dev/tcp/b/22'"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    need_hosts()
    with Network(("a", "b")) as running:
        yield running


def test_each_host_has_its_own_name_address_interface_processes_and_files(network: Network) -> None:
    a, b = network.hosts["a"], network.hosts["b"]
    assert (a.run("hostname"), b.run("hostname")) == ("a\n", "b\n")
    assert a.run("hostname -I").split() == [a.address]
    assert a.interface in a.run("ip -brief link")
    assert b.interface not in a.run("ip -brief link")
    assert a.run("getent hosts a").split()[0] == "127.0.1.1"
    b.run("sleep 1000 & echo here > /tmp/file; echo here > ~/file")
    wait_until(lambda: "sleep" in b.programs(), lambda: str(b.programs()))
    assert "sleep" not in a.programs()
    a.run("test ! -e /tmp/file && test ! -e ~/file")
    assert not Path("/tmp/file").exists()
    assert a.run("ssh b hostname") == "b\n"


def test_a_cut_host_is_silent_until_it_is_healed(network: Network) -> None:
    a, b = network.hosts["a"], network.hosts["b"]
    a.run(KNOCK)
    b.cut()
    code, _ = a.attempt(KNOCK)
    assert code != 0
    b.heal()
    a.run(KNOCK)


def test_a_power_cut_ends_everything_in_silence_and_keeps_files(network: Network) -> None:
    a, b = network.hosts["a"], network.hosts["b"]
    with (a.disk / "talk").open("w") as talk:
        talking = a.start("exec ssh b 'echo begun; sleep 1000'", talk)
        wait_until(lambda: "begun" in (a.disk / "talk").read_text(), lambda: "no ssh")
        b.run("echo kept > ~/kept")
        b.power_cut()
        assert b.programs() == []
        with pytest.raises(subprocess.TimeoutExpired):
            talking.wait(2)  # nobody told it: no FIN, no RST
        b.boot()
        assert b.run("cat ~/kept") == "kept\n"
        a.run(KNOCK)
        talking.kill()
        talking.wait()


def test_nothing_is_left_of_a_network_whose_process_was_killed() -> None:
    need_hosts()
    program = "\n".join(
        ["import signal", "from tests.hosts.network import Network", "with Network(['x', 'y']) as network:",
         "    network.hosts['x'].run('sleep 1000 & true')", "    print(network.folder, flush=True)",
         "    signal.pause()"]
    )  # fmt: skip
    before = set(psutil.net_if_addrs())
    maker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert maker.stdout is not None
    folder = Path(maker.stdout.readline().strip())
    assert set(psutil.net_if_addrs()) > before
    assert _mentioning(folder)
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate()
    wait_until(lambda: set(psutil.net_if_addrs()) <= before, lambda: str(psutil.net_if_addrs()))
    wait_until(lambda: not _mentioning(folder), lambda: str(_mentioning(folder)))
    assert folder.exists()
    with Network(["z"]):
        assert not folder.exists()


def _mentioning(folder: Path) -> list[int]:
    return [process.pid for process in psutil.process_iter() if str(folder) in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
