"""Of the ports that Ray opens where we start it, none tells anything to who has no token."""

import contextlib
import http.client
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.integration import jobs
from tests.ray_local import ROOT, RayCluster


def told_without_a_token(processes: Iterable[psutil.Process]) -> list[str]:
    """The ports of processes at which an HTTP server gives its metrics to anybody."""
    found = []
    for process in processes:
        connections = []
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
        for connection in connections:
            if connection.status != psutil.CONN_LISTEN:
                continue
            address = connection.laddr.ip.replace("::ffff:", "")
            asked = http.client.HTTPConnection(
                "127.0.0.1" if address in ("::", "0.0.0.0") else address, connection.laddr.port, timeout=5
            )
            try:
                asked.request("GET", "/metrics")
                if asked.getresponse().status == 200:
                    found.append(f"{process}: {connection.laddr}")
            except (OSError, http.client.HTTPException):  # it speaks something else, and wants a token there
                pass
            finally:
                asked.close()
    return found


def test_no_port_of_a_node_tells_its_metrics(ray_nodes: RayCluster) -> None:
    processes = psutil.Process(ray_nodes.head.pid).children(recursive=True)
    assert len(processes) > 3
    assert told_without_a_token(processes) == []


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_ray_of_this_machine_alone_is_quiet_and_closed(ray_nodes: RayCluster, tmp_path: Path) -> None:
    """Beside another Ray, and without a dashboard, which Ray Train's own helpers ask."""
    data_url = (tmp_path / "data").as_uri()
    jobs.make_digits(data_url)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [
        sys.executable, ROOT / "launch/train.py", "--config", ROOT / "configs/digits.yaml", *jobs.SMALL,
        f"run.url={(tmp_path / 'run').as_uri()}", f"data.url={data_url}", "train.steps=8", "cluster.workers=1",
    ]  # fmt: skip
    told: list[str] = []
    lines: list[str] = []
    with subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            lines.append(line)
            if "a new run begins" in line:
                told = told_without_a_token(psutil.Process(driver.pid).children(recursive=True))
    text = "".join(lines)
    assert driver.returncode == 0, text
    assert "finished at step 8" in text
    assert told == []
    assert "Traceback" not in text
    assert "PlacementGroupCleaner" not in text
    assert len(lines) < 30, text
