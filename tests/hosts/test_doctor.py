"""The doctor on two hosts with networks of their own, under a launcher: well, with a wrong clock, and cut off."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Job
from tests.hosts.conftest import need_hosts
from tests.hosts.network import ROOT, Host, Network

pytestmark = pytest.mark.hosts

LISTEN = (
    "import sys, time; from ddpm_dist.doctor import network; "
    "print(network.listen(sys.argv[1]), flush=True); time.sleep(99)"
)
PROBE = "import sys; from ddpm_dist.doctor import network; print(network.probe(sys.argv[1], int(sys.argv[2])))"
TEN_MINUTES_BEHIND = "import time; plain = time.time; time.time = lambda: plain() - 600"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    need_hosts()
    with Network(("a", "b")) as running:
        yield running


def doctor(network: Network, folder: Path, before: str = "") -> dict[str, dict[str, str]]:
    """{check: row} of both hosts; before: Python that host b runs first."""
    a, b = network.hosts["a"], network.hosts["b"]
    code = "from ddpm_dist.commands import doctor; doctor.main(['--json', '--nodes', '2'])"
    jobs = []
    for rank, host in enumerate((a, b)):
        place = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR={a.address} MASTER_PORT=29500"
        program = f"{before if host is b else ''}\n{code}"
        command = f'cd {ROOT} && {place} python -c "{program}" 2>/dev/null; true'
        jobs.append(Job(host, command, folder / f"{host.name}.log"))
    first, _ = (job.finish() for job in jobs)
    said = json.loads(first)
    return {row["check"]: row for row in said["rows"] if not row["node"] or row["node"] == "b"}


def test_two_hosts_that_are_well_and_one_whose_clock_is_not(network: Network, tmp_path: Path) -> None:
    well = doctor(network, tmp_path)
    assert not [row for row in well.values() if row["state"] == "FAILED"]
    assert well["nodes"]["found"] == "2: a, b"
    assert {well[name]["state"] for name in ("connections", "bandwidth", "clocks", "MTU", "code")} == {"ok"}
    off = doctor(network, tmp_path, TEN_MINUTES_BEHIND)
    assert [name for name, row in off.items() if row["state"] == "FAILED"] == ["clocks"]
    assert "600" in off["clocks"]["found"]


def listening(host: Host, folder: Path) -> int:
    job = Job(host, f"cd {ROOT} && exec python -c '{LISTEN}' {host.address}", folder / "listen.log")
    job.until(lambda: job.text.endswith("\n"))
    return int(job.text)


def test_a_host_that_no_packet_reaches(network: Network, tmp_path: Path) -> None:
    a, b = network.hosts["a"], network.hosts["b"]
    port = listening(b, tmp_path)
    probe = f"cd {ROOT} && python -c '{PROBE}' {b.address} {port}"
    assert "error=None" in a.run(probe)
    b.cut()
    try:
        assert f"error='{b.address}:{port}: " in a.run(probe)
    finally:
        b.heal()
