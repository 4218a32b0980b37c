"""The benchmark for GPUs, rehearsed: each part runs, says what it measured, and ends with one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_dist.errors import ConfigError
from tools.bench.gpu import PARTS, parse, table

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_has_the_columns_of_all_rows() -> None:
    rows = [{"side": "a", "ms": 1.23456}, {"side": "b", "images/s": 12345.6, "left out": "no time left"}]
    assert table(rows).splitlines() == [
        "| side | ms | images/s | left out |",
        "| --- | --- | --- | --- |",
        "| a | 1.235 |  |  |",
        "| b |  | 12,346 | no time left |",
    ]


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ConfigError, match="sees no GPU"):
        parse([])
    with pytest.raises(ConfigError, match="--small"):
        parse(["--device", "cpu"])
    assert parse(["--device", "cpu", "--small", "--parts", "all"]).parts == list(PARTS)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_part_is_rehearsed() -> None:
    command = [sys.executable, "-m", "tools.bench.gpu", "--parts", "all", "--device", "cpu", "--small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for part in PARTS:
        assert found[part], part
        for row in found[part]:
            assert "failed" not in row, (part, row)
            assert "left out" not in row, (part, row)
