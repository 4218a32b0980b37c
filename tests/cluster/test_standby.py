"""The standby and its children: real processes, real signals, and nothing of them left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ddpm_dist.cluster import standby as standbys, standby_key, standby_server
from ddpm_dist.cluster.child import Request
from ddpm_dist.cluster.standby import Child, Standby, find, private, start_plain
from ddpm_dist.errors import StandbyError
from ddpm_dist.recipe import dump_config
from tests.cluster.standby_children import HERE, LIGHT, request
from tests.integration import jobs, loop_ranks as loop


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For standbys of one test; their processes are gone at its end, killed or not."""
    made = private(tmp_path / "standby")
    yield made
    for process in processes(made):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(10)


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standby]:
    made = private(tmp_path_factory.mktemp("run") / "standby")
    found = find(made, LIGHT, watch=os.getpid())
    yield found
    for process in processes(made):
        process.kill()


def processes(folder: Path) -> list[psutil.Process]:
    """Standbys of a folder, known by their title or command, and their children, known by their parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if f"ddpm_dist standby {folder}/" in command or f"--folder {folder} " in command:
                found += [process, *process.children(recursive=True)]
    return found


@contextlib.contextmanager
def told(start: Callable[..., Child], asked: Request) -> Iterator[tuple[Child, int]]:
    """(child, descriptor of what it writes to the first of its descriptors); its output goes to /dev/null."""
    ours, theirs = os.pipe()
    nothing = os.open(os.devnull, os.O_WRONLY)
    child = start(asked, nothing, nothing, [theirs])
    os.close(theirs)
    os.close(nothing)
    try:
        yield child, ours
    finally:
        child.close()
        os.close(ours)


def everything(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, 1 << 16), b""))


def gone(pid: int, patience_s: float = 10.0) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def pid_of(folder: Path) -> int:
    (found,) = [p for p in processes(folder) if str(folder) in " ".join(p.cmdline())]
    return int(found.pid)


@pytest.mark.parametrize("plain", [False, True], ids=["forked", "plain"])
def test_a_child_is_what_a_new_process_would_be(standby: Standby, plain: bool, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    asked = request("about", "über", environment, str(tmp_path))
    out = (tmp_path / "out").open("wb")
    err = (tmp_path / "err").open("wb")
    ours, theirs = os.pipe()
    child = (start_plain if plain else standby.start)(asked, out.fileno(), err.fileno(), [theirs])
    os.close(theirs)
    found = json.loads(everything(ours))
    assert child.wait(60) == 7
    assert child.wait() == 7, "as often as one asks"
    child.close()
    os.close(ours)
    assert found["payload"] == "über"
    assert found["pid"] == child.pid
    assert found["open"] == [0, 1, 2, *found["given"]]
    assert found["environment"].items() >= environment.items()
    assert set(found["environment"]) - set(environment) <= {"LC_CTYPE"}, "of nobody else"
    assert found["directory"] == str(tmp_path)
    assert found["interrupt"]
    assert all(found["handlers"])
    assert found["threads"] == 1
    assert (tmp_path / "out").read_text() == "on stdout\n"
    assert (tmp_path / "err").read_text() == "on stderr\n"
    if not plain:
        assert found["title"] == "a child of a test"


def test_children_draw_other_random_numbers(standby: Standby) -> None:
    found = []
    for _ in range(2):
        with told(standby.start, request("about")) as (_, descriptor):
            found.append(json.loads(everything(descriptor))["random"])
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("plain", [False, True], ids=["forked", "plain"])
def test_exit_codes_and_signals_reach_the_asker(standby: Standby, plain: bool) -> None:
    start = start_plain if plain else standby.start
    for function, payload, code in [("leave", "3", 3), ("leave", "null", 0), ("leave", '"words"', 1), ("fail", "", 1)]:
        nothing = os.open(os.devnull, os.O_WRONLY)
        child = start(request(function, payload), nothing, nothing)
        os.close(nothing)
        assert child.wait(60) == code, (function, payload)
        child.close()
    with told(start, request("wait_for_ever")) as (child, descriptor):
        assert os.read(descriptor, 4) == b"here"
        with pytest.raises(TimeoutError):
            child.wait(0.05)
        child.signal(signal.SIGTERM)
        assert child.wait(60) == -signal.SIGTERM


def test_a_traceback_of_a_child_is_on_its_stderr(standby: Standby, tmp_path: Path) -> None:
    with (tmp_path / "err").open("wb") as err:
        child = standby.start(request("fail", "what was asked"), err.fileno(), err.fileno())
        assert child.wait(60) == 1
        child.close()
    assert "LookupError: what was asked" in (tmp_path / "err").read_text()


@pytest.mark.parametrize("plain", [False, True], ids=["forked", "plain"])
def test_a_child_ends_with_its_asker(plain: bool, tmp_path: Path) -> None:
    """However the asker dies."""
    folder = private(tmp_path / "standby")
    script = (
        "import os, sys, time; from tests.cluster.standby_children import *\n"
        f"start = start_plain if {plain} else find({str(folder)!r}, LIGHT, watch={os.getpid()}).start\n"
        "ours, theirs = os.pipe(); child = start(request('wait_for_ever'), 1, 2, [theirs])\n"
        "os.close(theirs); os.read(ours, 4); print(child.pid, flush=True); time.sleep(1000)"
    )
    asker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=loop.ROOT)
    assert asker.stdout is not None
    pid = int(asker.stdout.readline())
    assert not gone(pid, 0.2)
    asker.kill()
    asker.wait()
    assert gone(pid)
    assert plain or processes(folder), "the standby has outlived who started it"
    for process in processes(folder):
        process.kill()


def test_a_closed_child_is_killed(standby: Standby) -> None:
    with told(standby.start, request("wait_for_ever")) as (child, descriptor):
        os.read(descriptor, 4)
    assert gone(child.pid)


def test_a_killed_standby_takes_its_children_along_and_another_one_starts(folder: Path) -> None:
    with told(find(folder, LIGHT).start, request("wait_for_ever")) as (child, descriptor):
        os.read(descriptor, 4)
        os.kill(first := pid_of(folder), signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
        assert gone(child.pid)
    with told(find(folder, LIGHT).start, request("leave", "5")) as (child, _):
        assert child.wait(60) == 5
    assert pid_of(folder) != first


def test_who_asks_first_starts_it_and_all_others_find_it(folder: Path) -> None:
    script = f"from tests.cluster.standby_children import *; find({str(folder)!r}, LIGHT)"
    askers = [subprocess.Popen([sys.executable, "-c", script], cwd=loop.ROOT) for _ in range(3)]
    assert [asker.wait(120) for asker in askers] == [0, 0, 0]
    assert pid_of(folder), "one"


def test_one_whose_asker_was_killed_while_it_started_serves_the_next_asker(folder: Path) -> None:
    """The next one waits for it: a second one beside it would be refused by its lock."""
    slow = f"{HERE}:slow"
    script = f"from tests.cluster.standby_children import *; find({str(folder)!r}, {slow!r})"
    asker = subprocess.Popen([sys.executable, "-c", script], cwd=loop.ROOT)
    while not list(folder.glob("*.running")):
        assert asker.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # it holds its lock, and imports
    asker.kill()
    asker.wait()
    assert subprocess.run([sys.executable, "-c", script], cwd=loop.ROOT, check=False).returncode == 0
    assert pid_of(folder), "one"


@pytest.mark.parametrize(
    ("preload", "reason"),
    [("with_a_thread", "it has 2 threads after its imports"), ("failing", "no such GPU"), ("absent", "no attribute")],
)
def test_what_can_not_be_forked_serves_nothing_and_says_why(folder: Path, preload: str, reason: str) -> None:
    with pytest.raises(StandbyError, match=f"no standby: .*{reason}"):
        find(folder, f"{HERE}:{preload}")
    assert all(gone(process.pid) for process in processes(folder))


def test_a_standby_that_is_late_or_stopped_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(folder, LIGHT)
    stopped = psutil.Process(pid_of(folder))
    stopped.suspend()
    monkeypatch.setattr(standbys, "ANSWER_S", 0.3)
    ours, theirs = os.pipe()
    with pytest.raises(StandbyError, match="doesn't fork"):
        found.start(request("wait_for_ever"), 1, 2, [theirs])
    os.close(theirs)
    stopped.resume()
    assert everything(ours) == b"", "what was asked meanwhile is not done later"
    os.close(ours)
    assert stopped.children() == []
    monkeypatch.undo()
    with told(found.start, request("leave", "5")) as (child, _):
        assert child.wait(60) == 5, "it serves again"


def test_of_others_nothing_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o755)
    with pytest.raises(StandbyError, match=r"loose: is not a folder of this user alone \(mode 0700\)"):
        find(loose, LIGHT)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(StandbyError, match="not a folder of this user alone"):
        find(tmp_path / "link", LIGHT)
    if os.getuid() == 0:
        theirs = private(tmp_path / "theirs")
        os.chown(theirs, 65534, 65534)
        with pytest.raises(StandbyError, match="not a folder of this user alone"):
            find(theirs, LIGHT)
    find(folder, LIGHT)
    monkeypatch.setattr(standbys, "peer_uid", lambda connection: 65534)
    with pytest.raises(StandbyError, match="user 65534 listens there"):
        find(folder, LIGHT)


def test_a_stranger_is_not_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one can tell without a second user: the server's own check, on a real connection."""
    import socket

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "s"))
    listening.listen()
    server = standby_server.Server(listening, str(folder / "s"), None, 1.0)
    monkeypatch.setattr(standby_server, "peer_uid", lambda connection: 65534)
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(str(folder / "s"))
    server._accept()
    assert stranger.recv(10) == b""
    assert server._children == []


def test_other_code_or_another_environment_at_import_is_another_standby(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"OMP_NUM_THREADS": "2", "MINE": "1", "CUDA_VISIBLE_DEVICES": "0"}
    key = standby_key.key(LIGHT, environment)
    same = [{**environment, "OMP_NUM_THREADS": "4"}, {**environment, "MINE": "2"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    other = [{**environment, "CUDA_VISIBLE_DEVICES": ""}, {**environment, "DS_ACCELERATOR": "cpu"}]
    assert {standby_key.key(LIGHT, e) for e in same} == {key}
    assert len({key, *(standby_key.key(LIGHT, e) for e in other), standby_key.key("a:b", environment)}) == 4
    monkeypatch.chdir(tmp_path)
    assert standby_key.key(LIGHT, environment) != key
    file = tmp_path / "a.py"
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(standby_key.importlib.util, "find_spec", lambda name: found)
    hashes = set()
    for text in ("x = 1", "x = 2"):
        file.write_text(text)
        hashes |= {standby_key.package_hash(), standby_key.key(LIGHT, environment)}
    assert len(hashes) == 4


def test_it_ends_when_idle_and_leaves_nothing(folder: Path) -> None:
    find(folder, LIGHT, idle_s=0.5)
    pid = pid_of(folder)
    assert gone(pid, 30)
    assert list(folder.iterdir()) == []


def test_it_ends_with_the_process_that_it_watches(folder: Path) -> None:
    watched = subprocess.Popen(["sleep", "1000"])
    with told(find(folder, LIGHT, watch=watched.pid).start, request("wait_for_ever")) as (child, descriptor):
        os.read(descriptor, 4)
        pid = pid_of(folder)
        watched.kill()
        watched.wait()
        assert gone(pid, 5)
        assert gone(child.pid, 5)
    assert list(folder.iterdir()) == []
    with pytest.raises(StandbyError, match="no standby"):
        find(folder, LIGHT, watch=watched.pid)


@pytest.mark.timeout(300)
def test_the_preload_is_complete_and_a_child_trains(folder: Path, bucket_url: str) -> None:
    """Whatever a rank still imports by itself belongs into ddpm_dist/preload.py."""
    jobs.make_digits(f"{bucket_url}/data")
    cfg = loop.config(
        f"{bucket_url}/run", f"{bucket_url}/data", "train.steps=4", "logging.grid_images=4", "precision=bf16"
    )
    found = find(folder, "ddpm_dist.preload:everything")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with told(found.start, request("train", dump_config(cfg), environment, str(loop.ROOT))) as (child, descriptor):
        answer: dict[str, Any] = json.loads(everything(descriptor) or b"{}")
        assert child.wait(60) == 0
    assert answer["late"] == []
    assert answer["untouched"], "CUDA is for children"
    assert answer.get("cuda", 3.0) == 3.0
