"""`make demo`: what it says, what it leaves, and what happens when it is broken off."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MARK = "DDPM_DIST_TEST_OF_THE_DEMO"
KEYS = [
    "images_seen", "images_per_second", "data_wait_fraction", "frechet_pixel", "frechet_pixel_floor",
    "frechet_lite0", "frechet_lite0_floor", "grid", "tensorboard", "snapshot", "samples",
]  # fmt: skip


@pytest.fixture
def mark() -> Iterator[str]:
    """A value that all processes of a test's demo carry in their environment."""
    value = uuid.uuid4().hex
    yield value
    for process in marked(value):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def marked(value: str) -> list[psutil.Process]:
    """The processes, but for this one, that carry a mark. Ray's agents may have written over theirs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == value and process.pid != os.getpid():
                found.append(process)
    return found


def family(demo: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(demo.pid).children(recursive=True)


def start_demo(out: Path, mark: str, *arguments: str) -> subprocess.Popen[str]:
    """The demo in a session of its own, as a terminal would have it."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tools/local/demo.py", "digits", "--out", out, *arguments],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(demo: subprocess.Popen[str], words: str) -> str:
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if words in line:
            return said
    pytest.fail(f"the demo ended with {demo.wait()} before it said {words!r}:\n{said}")


def assert_nothing_stays(
    demo: subprocess.Popen[str], mark: str, members: Iterable[psutil.Process], patience_s: float
) -> None:
    """The processes are gone when the demo is; for one that was killed, soon after. members: those known before."""
    rest, _ = demo.communicate(timeout=120)
    _, alive = psutil.wait_procs(members, timeout=patience_s)
    left = [str(process) for process in {*alive, *marked(mark)} if process.is_running()]
    assert not left, f"{left} still run after:\n{rest}"


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        (signal.SIGINT, "[3/7"),  # the S3 server runs, Ray is starting
        (signal.SIGKILL, "[4/7"),  # Ray runs, a job is being submitted
        pytest.param(signal.SIGTERM, "[2/7", marks=pytest.mark.full),
        pytest.param(signal.SIGINT, "[4/7", marks=pytest.mark.full),
        pytest.param(signal.SIGINT, "a new run begins", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, "a new run begins", marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, "a new run begins", marks=pytest.mark.full),
    ],
)
def test_no_process_stays_behind(how: signal.Signals, moment: str, tmp_path: Path, mark: str) -> None:
    demo = start_demo(tmp_path / "out", mark)
    read_until(demo, moment)
    members = family(demo)
    assert members, "otherwise this test could not fail"
    assert marked(mark), "nor this way"
    if how is signal.SIGINT:
        os.killpg(demo.pid, how)  # as a terminal does it
    else:
        demo.send_signal(how)
    assert_nothing_stays(demo, mark, members, patience_s=60 if how is signal.SIGKILL else 0)
    assert demo.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "invalid choice: 'nothing'"), (["digits", "--steps", "-5"], "train.steps: -5")],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/local/demo.py", *arguments, "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_interrupted_and_gone_on_with(tmp_path: Path, mark: str) -> None:
    out = tmp_path / "out"
    demo = start_demo(out, mark, "--steps", "1000")
    read_until(demo, "step 700/1000")
    members = family(demo)
    os.killpg(demo.pid, signal.SIGINT)
    assert_nothing_stays(demo, mark, members, patience_s=0)
    demo = start_demo(out, mark, "--steps", "1000")
    said, _ = demo.communicate(timeout=1800)
    assert demo.returncode == 0, said
    steps = [int(step) for step in re.findall(r"continuing at step (\d+)", said)]
    assert [step >= 500 for step in steps] == [True], said
    assert not marked(mark)
    check_results(out, images=1000 * 32)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_from_a_fresh_clone(tmp_path: Path, mark: str) -> None:
    """Everything that a new user does, set-up included, and once more."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VIRTUAL_ENV"))}
    for round_ in range(2):
        done = subprocess.run(
            ["make", "demo", f"PYTHON={sys.executable}"],
            cwd=clone,
            env={**environment, MARK: mark},
            capture_output=True,
            text=True,
            timeout=1800,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not marked(mark)
        assert ("installing into .venv" in done.stdout) == (round_ == 0), "the set-up is done once"
        check_results(clone / "out/demo", images=None)
    assert "finished" in done.stdout
    shutil.rmtree(clone)


def check_results(out: Path, images: int | None) -> None:
    """summary.json has the promised keys, and what it points to is there."""
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == KEYS
    assert images is None or summary["images_seen"] == images
    assert summary["images_per_second"] > 0
    assert 0 <= summary["data_wait_fraction"] <= 1
    for name in ("pixel", "lite0"):
        assert 0 < summary[f"frechet_{name}_floor"] < summary[f"frechet_{name}"] * 10
    with Image.open(summary["grid"]) as grid:
        assert min(grid.size) >= 400
    assert list(Path(summary["tensorboard"]).glob("events.out.tfevents.*"))
    assert summary["snapshot"].startswith("s3://ddpm/runs/digits/snapshots/")
    assert summary["samples"].startswith("s3://ddpm/runs/digits/samples/")
