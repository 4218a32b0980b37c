"""The versions in constraints.txt exist for the Pythons that we support, beside the one that the tests run with."""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from virtualenv.seed.wheels.embed import get_embed_wheel

ROOT = Path(__file__).resolve().parents[1]
BUILT = {"deepspeed"}
"""Packages that come as source only, which pip builds on the spot: what they need is resolved in their place."""


def needs(package: str, python: str, extras: tuple[str, ...] = ()) -> list[Requirement]:
    """What a package asks for under a Python, with some of its extras; the markers are used up."""
    about = {"python_version": python, "python_full_version": f"{python}.0"}
    found = []
    for one in map(Requirement, requires(package) or []):
        if one.marker is None or any(one.marker.evaluate({**about, "extra": extra}) for extra in ("", *extras)):
            one.marker = None
            found.append(one)
    return found


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_constraints_resolve(python: str, tmp_path: Path) -> None:
    """By a pip that reads metadata without downloading what it describes: torch's CUDA is gigabytes."""
    asked: list[Requirement] = []
    for one in needs("ddpm_dist", python, ("test", "dev")):
        asked += needs(one.name, python) if one.name in BUILT else [one]
    pip = Path(get_embed_wheel("pip", python).path) / "pip"
    done = subprocess.run(
        [sys.executable, pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--python-version", python,
         "--only-binary=:all:", "--target", tmp_path, "--constraint", ROOT / "constraints.txt", *map(str, asked)],
        capture_output=True, text=True, timeout=1500, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
