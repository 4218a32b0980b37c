"""What the doctor says, for tests that plant a fault."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_dist.doctor import Row, State

ROOT = Path(__file__).resolve().parents[2]


def failing(rows: Sequence[Row]) -> dict[str, str]:
    """{name of a check that failed: what it found}; each of them has a remedy."""
    failed = [row for row in rows if row.state is State.FAILED]
    assert all(row.remedy for row in failed)
    return {row.check: row.found for row in failed}


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.check: row for row in rows}


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> tuple[int, list[Row], Any]:
    """(exit code, rows, the whole JSON) of tools/doctor.py --json. before: a command that starts what follows it."""
    # Not from the checkout: Ray puts a driver's working directory before what its workers find by themselves.
    command = [*before, sys.executable, str(ROOT / "tools/doctor.py"), "--json", *words]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, cwd="/", capture_output=True, text=True, timeout=200
    )
    assert done.stdout.startswith("{"), f"{done.stdout}\n{done.stderr}"
    said = json.loads(done.stdout)
    return done.returncode, [Row(**{**row, "state": State(row["state"])}) for row in said["rows"]], said
