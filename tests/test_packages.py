"""Without Ray, DeepSpeed, webdataset and s3fs: the mathematics and the snapshots work, all else says what it lacks."""

import subprocess
from pathlib import Path

import pytest

from ddpm_dist import packages
from tests import slim

ROOT = Path(__file__).resolve().parents[1]
LACKING = {
    "from ddpm_dist.cluster import ActorPool": "ray",
    "from ddpm_dist.training import EventLog": "tensorboard",
    "from ddpm_dist.engine import init_world": "psutil",
    "from ddpm_dist.sampling import grid_png": "pyspng",
    "from ddpm_dist.sampling import job": "ray",
    "from ddpm_dist.data import Loader": "pyspng",
    "from ddpm_dist import storage; storage.read('s3://bucket/x')": "s3fs",
}
"""What a person may try, and the package that it misses first."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with six packages, and ddpm_dist as in a checkout that isn't installed."""
    return slim.make(tmp_path_factory.mktemp("few") / "venv", extra=[ROOT / "ddpm_dist"])


def run(python: Path, code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(python), "-I", "-c", code, *words], capture_output=True, text=True, timeout=240, cwd=python.parents[1]
    )


def test_snapshots_and_samples_with_six_packages(python: Path, tmp_path: Path) -> None:
    done = run(python, slim.MATHEMATICS, (tmp_path / "snapshot").as_uri())
    assert (done.returncode, done.stdout) == (0, "(2, 1, 8, 8) True\n"), done.stderr


def test_what_needs_more_says_what_and_how_to_get_it(python: Path) -> None:
    code = "import sys\nfor one in sys.argv[1:]:\n try: exec(one)\n except Exception as e: print(type(e).__name__, e)"
    done = run(python, code, *LACKING)
    expected = [f"the package {name} is not installed here: pip install '{name}'" for name in LACKING.values()]
    *modules, store = done.stdout.splitlines()
    assert modules == [f"ModuleNotFoundError {text}" for text in expected[:-1]], done.stderr
    assert store == f"StorageError s3://bucket/x: {expected[-1]}"


@pytest.mark.parametrize(("program", "package"), [("train", "ray"), ("shards make", "pyspng")])
def test_a_command_that_lacks_a_package_is_one_message(python: Path, program: str, package: str) -> None:
    done = run(python, "from ddpm_dist.commands import scripts; scripts.by_name()", *program.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: the package {package} is not installed here: pip install '{package}'\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError(name="nowhere.inside"),
            "the package nowhere is not installed here: pip install 'nowhere'",
        ),
        (ModuleNotFoundError(name="sklearn.new"), "the package scikit-learn here has no sklearn.new: pip install 'sci"),
        (
            ModuleNotFoundError(name="ray.new"),
            "the package ray here has no ray.new: pip install 'ray[default]==2.60.0'",
        ),
        (ModuleNotFoundError(name="ddpm_dist.new"), None),
        (ModuleNotFoundError(name="json.new"), None),
        (ImportError("lib.so is too old", name="ray"), None),
        (None, None),
    ],
)
def test_which_package_is_to_blame(
    error: ImportError | None, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packages, "requires", lambda _: ["ray[default]==2.60.0", "scikit-learn>=1.9", 'x; extra == "a"']
    )
    said = packages.absent(error)
    assert said == text or (text and said and said.startswith(text))
