"""Faults between nodes: on a real Ray cluster, under a launcher, on sockets; and what is shown of them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_dist.commands import doctor
from ddpm_dist.doctor import Examination, Row, State, as_report, as_table, fleet, network, node
from ddpm_dist.errors import ConfigError
from tests.doctor import faults
from tests.doctor.faults import ROOT, failing
from tests.ray_local import RayCluster
from tools.local.s3_server import free_port


def test_the_packages_are_those_of_setup() -> None:
    asked = re.search(r"INSTALL = \[(.*?)\]\n", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert asked
    names = re.findall(r'^    "([\w-]+)', asked[1], re.MULTILINE)
    assert set(names) == set(node.PACKAGES)


@pytest.mark.full
def test_a_cluster_whose_nodes_differ(ray_cluster: RayCluster, bucket_url: str, tmp_path: Path) -> None:
    """First as it is: no failing row. Then a node comes with another webdataset and another checkout."""
    data = f"{bucket_url}/digits"
    subprocess.run(
        [sys.executable, str(ROOT / "tools/make_shards.py"), "digits", data], check=True, capture_output=True
    )
    words = ["--config", "digits", f"run.url={bucket_url}/run", f"data.url={data}"]
    environment = {"RAY_ADDRESS": ray_cluster.address, **ray_cluster.env}
    code, rows, said = faults.run([*words, "--nodes", "1"], environment)
    assert (code, failing(rows)) == (0, {})
    assert len(said["nodes"]) == 1

    other = tmp_path / "other"
    shutil.copytree(ROOT / "ddpm_dist", other / "ddpm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "ddpm_dist" / "rng.py").open("a").write("# changed\n")
    (other / "webdataset-0.9.0.dist-info").mkdir()
    (other / "webdataset-0.9.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: webdataset\nVersion: 0.9.0\n"
    )
    before = dict(ray_cluster.env)
    ray_cluster.env["PYTHONPATH"] = str(other)
    added = ray_cluster.add_node(1)
    ray_cluster.env.update(before)
    try:
        code, rows, _ = faults.run([*words, "--nodes", "3", "cluster.workers=16"], environment)
    finally:
        ray_cluster.kill_node(added)
    found = failing(rows)
    assert code == 1
    assert set(found) == {"nodes", "packages", "code", "resources"}
    assert found["nodes"] == "2 are there, 3 were expected (--nodes)"
    assert re.fullmatch(
        r"webdataset: (1\.0\.2 on \S+, 0\.9\.0 on \S+|0\.9\.0 on \S+, 1\.0\.2 on \S+)", found["packages"]
    )
    assert found["resources"] == "16 workers need 16 CPU, the cluster has 5"


def test_an_address_where_no_ray_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def dashboard() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        threading.Thread(target=dashboard, daemon=True).start()
        code, rows, _ = faults.run([], {"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"})
    assert (code, list(failing(rows))) == (1, ["cluster"])
    assert "a web server answers" in rows[0].found


PROGRAM = (
    "import sys; from ddpm_dist.doctor import groups; groups.JOIN_S = {patience}; "
    "from ddpm_dist.commands import doctor; from ddpm_dist import cli; cli.run(lambda _: doctor.main(['--json']))"
)


def started(rank: int, patience: float, port: int) -> "subprocess.Popen[str]":
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM.format(patience=patience)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.full
def test_two_nodes_under_a_launcher_and_one_that_never_comes() -> None:
    """A WORLD_SIZE that an earlier job left in a shell is the latter."""
    port = free_port()
    both = [started(rank, 60, port) for rank in (0, 1)]
    alone = started(0, 3, free_port())
    (out, err), (silence, _) = (process.communicate(timeout=120) for process in both)
    assert [process.returncode for process in both] == [0, 0], err
    said = json.loads(out)
    assert (len(said["nodes"]), silence) == (2, ""), "the first one speaks for all"
    assert {row["state"] for row in said["rows"] if row["check"] in ("code", "connections", "clocks")} == {"ok"}
    out, _ = alone.communicate(timeout=120)
    (row,) = json.loads(out)["rows"]
    assert (alone.returncode, row["check"], row["state"]) == (1, "cluster", "FAILED")
    assert "WORLD_SIZE" in row["remedy"]


# The way from node to node


def test_a_closed_port_a_slow_way_and_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PROBE_S", 0.2)
    good = network.probe("127.0.0.1", network.listen("127.0.0.1"))
    assert (good.error, good.bytes_per_s > 0, abs(good.clock_ahead_s) < 60) == (None, True, True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    refused = network.probe("127.0.0.1", closed)
    assert failing([fleet.connections.row(of({("a", "b"): good, ("b", "a"): refused}))]) == {
        "connections": f"from b to a: 127.0.0.1:{closed}: Connection refused"
    }
    crawling = of({("a", "b"): replace(good, bytes_per_s=2e6)})
    assert failing([fleet.bandwidth.row(crawling)]) == {"bandwidth": "at least 2 MB/s (from a to b)"}
    late = of({("a", "b"): replace(good, clock_ahead_s=-600.0)})
    assert failing([fleet.clocks.row(late)]) == {"clocks": "b is 600.0 s behind a"}
    assert fleet.clocks.row(of({("a", "b"): replace(good, clock_ahead_s=2.0)})).state is State.REMARK


def test_who_hangs_up_is_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        assert network.probe("127.0.0.1", server.getsockname()[1]).error


def about(name: str, **other: object) -> node.About:
    return replace(node.About(name, "3.11.7", "Linux", "abc", {"torch": "2.13.0"}, ("H100, driver 1",), 9000), **other)


def of(links: dict[tuple[str, str], network.Link], *abouts: node.About) -> fleet.Fleet:
    return fleet.Fleet([], list(abouts), {}, links, None, None, None)


def test_nodes_beside_one_another() -> None:
    two = of({}, about("a"), about("b"), about("c", python="3.12.1", mtu=1500, gpus=("A100, driver 1",)))
    assert failing([fleet.python.row(two)]) == {"python": "3.11.7 on a, b, 3.12.1 on c"}
    assert failing([fleet.mtu.row(two)]) == {"MTU": "9000 on a, b, 1500 on c"}
    assert fleet.alike.row(two).state is State.REMARK
    absent = of({}, about("a"), about("b", packages={"torch": None}))
    assert failing([fleet.packages.row(absent)]) == {"packages": "torch: 2.13.0 on a, absent on b"}
    silent = replace(two, silent={"d": "ModuleNotFoundError: No module named 'ddpm_dist'"})
    assert "d: ModuleNotFoundError" in failing([fleet.nodes.row(silent)])["nodes"]


# What is shown


def examination() -> Examination:
    secret, here = os.environ["AWS_SECRET_ACCESS_KEY"], socket.gethostname()
    rows = [
        Row("code", "", State.OK, "abc"),
        Row("CPUs", here, State.OK, "2"),
        Row("CPUs", "other", State.OK, "2"),
        Row("data", "other", State.FAILED, f"s3://my-bucket/data: {secret} refused at 10.1.2.3", "correct it"),
        Row("GPUs", "other", State.SKIPPED, "no GPU is wanted here"),
    ]
    return Examination(rows, [about(here), about("other")])


def test_the_table_names_what_failed_first_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    lines = as_table(examination()).splitlines()
    assert lines[0].startswith("FAILED  data  other  s3://my-bucket/data")
    assert lines[1].endswith("-> correct it")
    assert sum("CPUs" in line for line in lines) == 1, "all nodes say the same"
    assert not any("GPUs" in line for line in lines)
    assert lines[-1] == "1 FAILED, 3 ok, 0 remarks, 1 not needed here, on 2 nodes; what mends each stands below it"


def test_a_report_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    text = as_report(examination(), ["s3://my-bucket/data"])
    for private in ("hush", "my-bucket", "10.1.2.3", f"{socket.gethostname()}:", str(Path.home()) + "/"):
        assert private not in text
    assert "node-2" in text
    assert "torch 2.13.0" in text


def test_words_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no --config"):
        doctor.main(["run.url=file:///x"])
    with pytest.raises(SystemExit):
        doctor.main(["--nodes", "0"])
    assert "expected a whole number from 1 on" in capsys.readouterr().err
