"""A job that starts another one beside itself, on a cluster that takes jobs."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.ray_local import ROOT
from tools.local.ray_cluster import RayCluster

STARTER = """
import sys
from ddpm_dist.cluster.jobs import submit_beside
from ddpm_dist.cluster.connect import connect_ray
connect_ray()
first, second = submit_beside(sys.argv[1]), submit_beside(sys.argv[1])
print("started", first, first == second)
"""


@pytest.mark.full
def test_a_job_starts_another_one_once(tmp_path: Path) -> None:
    (tmp_path / "starter.py").write_text(STARTER)
    mark = tmp_path / "mark"
    command = f"""sh -c "echo started >> {mark}; sleep 5; echo ended >> {mark}" """
    with RayCluster(1, {**os.environ, "PYTHONPATH": str(ROOT)}) as cluster:
        lines: list[str] = []
        cluster.submit([sys.executable, "starter.py", command], lines.append, tmp_path)
        assert any(line.startswith("started raysubmit_") and line.endswith("True") for line in lines), lines
        deadline = time.monotonic() + 60
        while not mark.exists() or "ended" not in mark.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert mark.read_text().split() == ["started", "ended"]
