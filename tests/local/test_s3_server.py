"""tools/local/s3_server.py against processes, ports and files as they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_dist import storage
from tools.local.s3_server import PORTS, ROOT, S3Server, free_port


def test_what_was_acknowledged_survives_a_kill(bucket_url: str, s3_server: S3Server) -> None:
    endpoint = s3_server.endpoint
    storage.publish(f"{bucket_url}/a", b"kept")
    s3_server.kill()
    assert not s3_server.running
    s3_server.restart()
    assert s3_server.endpoint == endpoint
    assert storage.read(f"{bucket_url}/a") == b"kept"


def test_another_server_on_the_same_folder_has_the_objects_but_other_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for _ in range(2):
        with S3Server(tmp_path) as server:
            for name, value in server.env.items():
                monkeypatch.setenv(name, value)
            storage.clear_instances()
            seen.append((server.env["AWS_SECRET_ACCESS_KEY"], storage.list_names(f"s3://{server.bucket}/x")))
            storage.publish(f"s3://{server.bucket}/x/object", b"1")
    storage.clear_instances()
    assert [names for _, names in seen] == [[], ["object"]]
    assert seen[0][0] != seen[1][0]


def test_the_command_gets_the_environment_and_its_exit_code_is_ours(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['AWS_ENDPOINT_URL']); sys.exit(7)"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/local/s3_server.py", "--dir", tmp_path / "s3", "--", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7
    assert done.stdout.startswith("http://127.0.0.1:")
    assert "SECRET" not in done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_whoever_started_it(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, ROOT / "tools/local/s3_server.py", "--dir", tmp_path, "--", "sleep", "600"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    assert parent.stderr.readline().startswith("S3 server at")
    assert _processes_with(str(tmp_path), "mini")
    parent.send_signal(how)
    parent.wait(30)
    deadline = time.monotonic() + 10
    while _processes_with(str(tmp_path), "mini") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_with(str(tmp_path), "mini")
    parent.stderr.close()


def _processes_with(*words: str) -> list[int]:
    """Pids whose command line holds all the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if all(word in command for word in words):
                found.append(int(entry.name))
    return found


def test_no_port_is_given_twice_while_nobody_has_opened_it() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == 500
    assert set(ports) <= set(PORTS), "below those that the kernel takes for outgoing connections"
