"""The wheel, installed into a fresh environment outside the checkout: its programs train, sample and evaluate.

And what `pip install` finds for Pythons that we don't test with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slim
from tests.integration import jobs
from tools.local.ray_cluster import RayCluster
from tools.local.s3_server import free_port

ROOT = Path(__file__).resolve().parents[1]
SMALL = (*jobs.SMALL, "train.steps=4", "checkpoint.snapshot_every_steps=4", "sampling.steps=3")
SOURCES = ("ddpm_dist", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build`, of a copy of what belongs into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--outdir", "dist", "source"], folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, which finds all other packages in ours."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    install(wheel, folder / "bin" / "python", "--no-deps", "--no-index")
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("deepspeed", "deepspeed.launcher.runner")):
        script = folder / "bin" / name
        script.write_text(
            f"#!{folder}/bin/python\nfrom {module} import main\n\nif __name__ == '__main__':\n    main()\n"
        )
        script.chmod(0o755)
    return folder / "bin"


def install(wheel: Path, python: Path, *options: str) -> None:
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *options, str(wheel)], wheel.parent)


def clean_environment(programs: Path) -> dict[str, str]:
    """Without a way into the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**environment, "PATH": f"{programs}:{environment['PATH']}", "DS_ACCELERATOR": "cpu"}


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def data_url(programs: Path, tmp_path: Path) -> str:
    url = (tmp_path / "data").as_uri()
    run(["ddpm-shards", "make", "digits", url, "--workers", "2"], tmp_path, clean_environment(programs))
    return url


def test_it_holds_the_recipes_and_nothing_of_the_checkout(wheel: Path) -> None:
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    recipes = {path.name for path in (ROOT / "configs").glob("*")}
    assert set(re.findall(r"^ddpm_dist/configs/(\S+)", names, re.MULTILINE)) == recipes
    assert set(re.findall(r"^([^/\s]+)/", names, re.MULTILINE)) == {
        "ddpm_dist",
        wheel.name.split("-py3")[0] + ".dist-info",
    }


def test_a_whole_run_without_a_checkout(programs: Path, data_url: str, tmp_path: Path) -> None:
    """Shards, training under Ray and under DeepSpeed's launcher, samples, evaluation."""
    environment = clean_environment(programs)
    run_url = (tmp_path / "run").as_uri()
    urls = [f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=1", *SMALL]
    recipe = ["--config", "digits", *urls]
    run(["ddpm-shards", "verify", data_url], tmp_path, environment)
    run(["ddpm-train", *recipe], tmp_path, environment)
    launcher = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        str(programs / "ddpm-train-deepspeed"),
    ]
    run([*launcher, *recipe, "train.steps=6"], tmp_path, environment)
    drawn = run(["ddpm-sample", *recipe, "train.steps=6", "--num-samples", "32"], tmp_path, environment)
    assert json.loads(drawn.splitlines()[-1])["step"] == 6
    words = ["--samples", json.loads(drawn.splitlines()[-1])["samples"], "--metrics", "frechet_pixel"]
    result = json.loads(
        run(["ddpm-evaluate", *recipe, "train.steps=6", *words], tmp_path, environment).splitlines()[-1]
    )
    assert (result["num_samples"], set(result["metrics"]) >= {"frechet_pixel"}) == (32, True)
    listed = run(["ddpm-inspect", "checkpoint", "list", run_url], tmp_path, environment)
    assert "000000006" in listed


@pytest.fixture
def cluster(programs: Path) -> Iterator[RayCluster]:
    with RayCluster(2, clean_environment(programs), programs) as running:
        yield running


def test_a_ray_job_without_a_working_directory(cluster: RayCluster, data_url: str, tmp_path: Path) -> None:
    """`ray job submit -- ddpm-train …` where the package is installed; its follower is found, too."""
    lines: list[str] = []
    run_url = (tmp_path / "run").as_uri()
    overrides = [f"run.url={run_url}", f"data.url={data_url}", "cluster.workers=1", *SMALL, "evaluation.every=4"]
    overrides += ["evaluation.metrics=[frechet_pixel]", "evaluation.num_samples=32"]
    cluster.submit(["ddpm-train", "--config", "digits", *overrides], lines.append, working_dir=None)
    assert "finished at step 4" in "\n".join(lines)
    assert "snapshots are evaluated by the Ray job" in "\n".join(lines)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run" / "evaluation" / "results").glob("*.json")):
        assert time.monotonic() < deadline, "the follower evaluated nothing"
        time.sleep(0.5)


def test_six_packages_and_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Really installed, with what those six need and no more."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install(wheel, python, "--no-deps", "--no-index")
    options = ["-q", "--constraint", str(ROOT / "constraints.txt")]
    run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, *slim.FEW], tmp_path)
    assert run([str(python), "-I", "-c", slim.MATHEMATICS, (tmp_path / "snapshot").as_uri()], tmp_path) == (
        "(2, 1, 8, 8) True\n"
    )
    lacking = subprocess.run([python.with_name("ddpm-train")], capture_output=True, text=True, cwd=tmp_path)
    text = "error: the package ray is not installed here: pip install 'ray[data,default,train]==2.60.0'\n"
    assert (lacking.returncode, lacking.stderr) == (1, text)
